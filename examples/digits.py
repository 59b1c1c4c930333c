"""Digits of a class, by flow matching with classifier-free guidance: the label enters as a one-hot context.

    pip install 'cnf[programs]'
    python examples/digits.py --steps 2000
The same by the programs: cnf train fm-digits --condition label --drop-condition 0.1 --out runs/digits; cnf sample runs/digits --class 3 --guidance 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import cnf
from cnf.losses import FlowMatching
from cnf.plotting import image_grid


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("digits.png"))
    options = parser.parse_args(arguments)
    pixels, labels = load_digits(return_X_y=True)
    x, label = torch.tensor(pixels, dtype=torch.uint8).reshape(-1, 1, 8, 8), torch.eye(10)[torch.tensor(labels)]
    torch.manual_seed(0)
    model = cnf.FlowConfig.of(field="unet", hidden=(32, 64), unet_depth=1, preprocess="center", dequantize="truncated-normal")
    flow = cnf.build(model, cnf.SolverConfig(), (1, 8, 8), levels=17, context_dim=10)
    cnf.fit(flow, (x, label), loss=FlowMatching(flow, drop_context=0.1), steps=options.steps, batch_size=128, quiet=True)
    rows = torch.eye(10).repeat_interleave(8, 0)  # eight of each class
    with torch.no_grad():
        samples = cnf.guided(flow, options.guidance).sample(1, rows, noise=cnf.Noise(0), solver=cnf.FixedGrid("rk4", 8))[0]
    image_grid(samples, options.out)
    print(f"80 digits in {options.out}")


if __name__ == "__main__":
    main()
