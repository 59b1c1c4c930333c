"""sample.py: images of a trained autoencoder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnf._utils.errors import ConfigError
from cnf._utils.output import emit
from cnf.cli.common import usable_device
from cnf.cli.sample_options import IMAGES, parser
from cnf.random import Noise
from cnf.runs import load, outputs, write_atomic
from cnf.vae import FlowVAE

__all__ = ["sample_images"]

BATCH = 256  # images decoded at once
FLOWS = ("quality", "grid_steps", "method", "precision", "label", "given", "guidance", "trajectory")  # options without effect here


def sample_images(options: Any) -> int:
    """Draw the expected images of latents from the prior by these options of the program and return the exit code."""
    plain = parser("sample").parse_args([str(options.run)])
    if idle := next((name for name in FLOWS if getattr(options, name) != getattr(plain, name)), None):
        name = {"label": "class"}.get(idle, idle).replace("_", "-")
        raise ConfigError(f"--{name} is for flows, and {options.run} is an autoencoder: its samples are decoded latents of the prior, without an ODE; leave it out")
    out: Path = options.out or outputs(options.run) / "samples" / f"sample-{options.seed}.png"
    if out.suffix not in (".png", ".npz"):
        raise ConfigError(f"--out {out}: an autoencoder draws images, as .png or .npz")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder cannot be made: {error}") from None
    model: FlowVAE = load(options.run, usable_device(options.device))
    n: int = options.n or IMAGES
    parts = []
    for start in range(0, n, BATCH):
        noise = Noise(options.seed, "sample", start=start, total=n)
        parts.append(model.sample(min(BATCH, n - start), noise=noise, temperature=options.temperature).cpu())
    x = torch.cat(parts)
    if out.suffix == ".png":
        from cnf import plotting

        plotting.image_grid(x, out)
    else:

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, samples=x.numpy())

        write_atomic(out, save)
    what = "probabilities of white" if model.levels == 2 else "expected grey levels in [0, 1]"
    emit("result", f"{n:,} samples of {os.path.normpath(options.run)} in {out} ({what})", samples=n, file=out)
    return 0
