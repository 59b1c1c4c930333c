"""Presets of variational autoencoders whose posterior is a CNF (FFJORD, 1810.01367)."""

from __future__ import annotations

from cnf.config.model import AutoencoderConfig
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.config.solver import SolverConfig

__all__ = ["AUTOENCODERS"]

# A plain design for minutes on a CPU: perceptrons, 16 latents, one CNF with updates of rank 8. FFJORD's own (145,571,809 parameters):
# --network conv --latent 64 --flow-hidden 1024 1024 --rank 64 --blocks 2 --batch-size 100 --lr 5e-4 --schedule constant,
# 2,000 epochs with a warm-up of the KL term in the first 100, by Adamax
_MODEL = AutoencoderConfig()
_SOLVER = SolverConfig.of(grid_steps=1, automatic_steps=True)
_TRAIN = TrainConfig.of(
    objective="elbo", steps=10_000, batch_size=100, kl_warmup=2000, validate_every=1000, noise_samples=2, solver_check_tolerance=0.5, threads=1
)


def _images(name: str, data: DataConfig, shape: tuple[int, ...], summary: str, cost: str, levels: int = 2, network: str = "mlp") -> dict[str, Preset]:
    return {name: Preset(RunConfig(name, data, _MODEL.change(network=network), _SOLVER, _TRAIN), summary, cost, shape, levels)}


AUTOENCODERS = {
    "vae-digits": Preset(
        RunConfig(
            "vae-digits",
            DataConfig("digits", binarize="redraw"),
            _MODEL.change(latent=8, hidden=(128, 128)),
            _SOLVER,
            _TRAIN.change(steps=2000, batch_size=64, lr=2e-3, kl_warmup=500, validate_every=100, solver_check_tolerance=0.05),
        ),
        "real 8x8 digits, drawn anew as binary images at each step",
        "about 4 minutes on one core",
        (1, 8, 8),
        2,
    ),
    **_images("vae-mnist", DataConfig("mnist", binarize="once"), (1, 28, 28), "MNIST, binary images drawn once", "about 0.25 s a step on one busy core"),
    **_images("vae-omniglot", DataConfig("omniglot", binarize="redraw"), (1, 28, 28), "Omniglot, drawn anew as binary images at each step", "as vae-mnist"),
    **_images("vae-freyfaces", DataConfig("freyfaces"), (1, 28, 20), "Frey faces, 256 grey levels, gated convolutions", "sized for a GPU; up to 30 s a step on one busy core", 256, "conv"),
    **_images("vae-caltech", DataConfig("caltech"), (1, 28, 28), "Caltech 101 silhouettes", "as vae-mnist"),
}
