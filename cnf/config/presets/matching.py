"""Presets of flow matching."""

from __future__ import annotations

from cnf.config.model import FlowConfig
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.config.solver import SolverConfig

__all__ = ["MATCHING"]

# a denoiser on pixels in [-1, 1], whose path begins with the dequantisation noise; squeezed once, since convolutions at
# full size cost four times as much
_UNET = FlowConfig.of(
    field="unet", hidden=(64, 96), squeeze_first=True, dequantize="truncated-normal", preprocess="center", unet_depth=2
)
# a U-Net has no closed-form trace. Fine-tuning (--objective both): as many solver steps as the measured error requires,
# with checkpoints, since evaluations of a U-Net store much. --compile halves the time (two cores: 0.15 s instead of
# 0.27 s per evaluation of 32 images, forward and backward), after a minute or two of compilation
_SOLVER = SolverConfig.of(
    grid_steps=8, automatic_steps=True, gradient="checkpoint", divergence="hutchinson", precision="bf16",
    likelihood_solver="adams",
    # --likelihood-solver adaptive: the trace at every stage. A trained path needs 63 quadrature nodes, which cost more than its 120 evaluations with
    # a product and are no more accurate (16 MNIST images: error 0.0006 instead of 0.0005 bits/dim; at 1e-4 0.004)
    eval_tolerance=0.0,
)  # fmt: skip
# --objective both: fine-tuning batches of 32 and at most 14 solver steps, since a U-Net's solve stores much even with
# checkpoints
_BOTH = {"finetune_batch_size": 32}
_TRAIN = TrainConfig.of(
    objective="flow-matching", batch_size=128, lr=1.5e-3, warmup=200, max_grad_norm=1.0, ema_decay=0.9995, noise_samples=1,
    max_grid_steps=14,
)

MATCHING = {
    "fm-digits": Preset(
        RunConfig(
            "fm-digits",
            DataConfig("digits"),
            _UNET.change(hidden=(32, 48), unet_depth=1, squeeze_first=False),
            # error 0.0010 at 1e-5, 0.0003 at these tolerances, for half as many evaluations again
            # likelihoods: +0.0011 in 32 steps of adams, which cost little here
            _SOLVER.change(precision="fp32", eval_rtol=2e-6, eval_atol=2e-6, likelihood_steps=48),
            # 1,077 images: a tenth of digits' weight decay (all of it and twice the lr: validation 1.824, this: 1.791).
            # Constant lr and even times: 0.0154 +- 0.0023 bits/dim better on validation images than cosine and
            # importance (three seeds). Validation is best after 2,250 to 2,500 steps
            _TRAIN.change(
                steps=2500, lr=2e-3, schedule="constant", fm_time_sampling="even", weight_decay=0.1, validate_every=250, noise_samples=5,
                threads=1, ema_decay=0.999,
            ),
        ),
        "real 8x8 digits, U-Net denoiser, matched",
        "about 4.5 minutes on one core",
        (1, 8, 8),
        17,
        otherwise=_BOTH,
    ),
    "fm-mnist": Preset(
        RunConfig(
            "fm-mnist",
            DataConfig("mnist"),
            _UNET,
            _SOLVER,
            _TRAIN.change(steps=15_000, validate_every=3000, validation_items=256, test_items=1000),
        ),
        "U-Net denoiser, matched",
        "about an hour on two cores (0.2 s a step of 128 images)",
        (1, 28, 28),
        256,
        otherwise=_BOTH,
    ),
    "fm-cifar10": Preset(
        RunConfig(
            "fm-cifar10",
            DataConfig("cifar10"),
            _UNET.change(hidden=(128, 192, 256), attention=True),
            _SOLVER,
            _TRAIN.change(steps=60_000, lr=1e-3, warmup=1000, validate_every=5000, validation_items=256, test_items=1000),
        ),
        "U-Net denoiser with attention, matched",
        "sized for a GPU; for a CPU --hidden 64 96 --no-attention",
        (3, 32, 32),
        256,
        otherwise=_BOTH,
    ),
}
