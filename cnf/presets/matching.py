"""Presets of flow matching, fine-tuned by the likelihood."""

from __future__ import annotations

from dataclasses import replace

from cnf.models import ModelConfig, SolverConfig
from cnf.presets.settings import DataConfig, Preset, RunConfig, TrainConfig

__all__ = ["MATCHING"]

# a denoiser on pixels between -1 and 1, whose dequantisation noise is the path's beginning; squeezed once, as every convolution
# at full size costs four times as much
_UNET = ModelConfig(
    "stack", "unet", (64, 96), squeeze_first=True, dequantize="truncated-normal", marginals="center", unet_depth=2
)
# the trace of a U-Net has no closed form. Fine-tuning: as many steps as the measured error asks for; evaluations recomputed, since
# those of a U-Net keep much. --compile halves its time (on two cores 0.15 s in place of 0.27 s for an evaluation of 32 images, forward
# and backward), after a minute or two of compilation
_SOLVER = SolverConfig(
    "rk4", grid_steps=8, automatic_steps=True, gradient="checkpoint", divergence="hutchinson", precision="bf16",
    # a trained path takes dopri5 460 evaluations at 1e-5 and 200 at 1e-4, which is 0.0025 bits/dim away
    eval_rtol=1e-4, eval_atol=1e-4, eval_tolerance=1e-3,
)  # fmt: skip
_TRAIN = TrainConfig(
    objective="both", lr=1.5e-3, warmup=200, max_grad_norm=1.0, ema_decay=0.999, draws=1
)

MATCHING = {
    "fm-digits": Preset(
        RunConfig(
            "fm-digits",
            DataConfig("digits"),
            replace(_UNET, hidden=(32, 48), unet_depth=1, squeeze_first=False),
            replace(_SOLVER, precision="fp32"),
            # 1,077 images: a tenth of the digits preset's decay; with all of it and twice the rate validation came to 1.824, so to 1.791
            replace(
                _TRAIN, objective="flow-matching", steps=1500, batch_size=128, lr=2e-3, weight_decay=0.1, validate_every=250, draws=5,
                threads=1,
            ),
        ),
        "real 8x8 digits, U-Net denoiser, matched",
        "about 1.5 minutes on one core",
        (1, 8, 8),
        17,
    ),
    "fm-mnist": Preset(
        RunConfig(
            "fm-mnist",
            DataConfig("mnist"),
            _UNET,
            _SOLVER,
            replace(
                _TRAIN, steps=15_100, tune_steps=100, tune_batch_size=32, batch_size=128, validate_every=1000, validation_items=256,
                max_grid_steps=14,
            ),
        ),
        "U-Net denoiser, matched, then fine-tuned by the likelihood",
        "about 0.2 s a step of 128 images on two cores while it is matched",
        (1, 28, 28),
        256,
    ),
}
