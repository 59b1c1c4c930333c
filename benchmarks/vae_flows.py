"""Variational autoencoders with three posteriors: normal, a CNF that is the same for all data, an amortised CNF (FFJORD, 1810.01367).

    python benchmarks/vae_flows.py [--data digits] [--seeds 2] [--steps 400] [--data-root data] [--pictures docs/pictures]

Data are binarised once, each pixel at random with its grey level as probability. Encoder and decoder are perceptrons of two
hidden layers; the rank of the amortised flow's weight updates is 8. Prints the evidence lower bound of the test split with its
standard error over images (and over seeds, if there are several), the KL term and the importance-weighted likelihood of a
few images, and draws data, reconstructions and samples. One process, one thread. ``--quick``: one seed, 20 steps.

This is a plain design, not the published system: that has gated convolutions on MNIST, 64 latents, two flows of 1024-1024
with updates of rank 64, and a warm-up of 100 epochs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from measure import RESULTS, machine, markdown, record, spread, versions

import cnf
from cnf.data import load
from cnf.losses.elbo import ELBO, estimate_elbo
from cnf.plotting.canvas import new_figure, save_figure, subplots, tiles
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.vae import FlowVAE, vae_mlp

POSTERIORS = ("normal", "cnf", "cnf-rank")
IMPORTANCE = 64  # images of the importance-weighted likelihood
Row = dict[str, Any]


def binarised(x: torch.Tensor, levels: int, seed: int) -> torch.Tensor:
    """Return binary images, each pixel 1 with the probability of its grey level k / (levels - 1)."""
    level = x.float() / (levels - 1)
    return (torch.rand(level.shape, generator=torch.Generator().manual_seed(seed)) < level).float()


def run(posterior: str, seed: int, steps: int, parts: Sequence[torch.Tensor], samples: int) -> tuple[Row, FlowVAE]:
    """Return the figures of one training, and the model."""
    begun = time.process_time()
    torch.manual_seed(seed)
    train, validation, test = parts
    latent, hidden = (8, 128) if train[0].numel() <= 64 else (16, 256)
    model = vae_mlp(train.shape[1:], latent, hidden, posterior=posterior, flow_hidden=(64,), solver=FixedGrid("rk4", 4))  # type: ignore[arg-type]
    for block in model.blocks:
        block.eval_solver = Adaptive("dopri5", 1e-5, 1e-5)
    every = max(1, steps // 5)
    loss = ELBO(model, warmup=steps // 4)
    cnf.fit(model, train, validation=validation, loss=loss, steps=steps, batch_size=64, lr=2e-3, validate_every=every, seed=seed, quiet=True)
    found = estimate_elbo(model, test, draws=2, seed=1)
    with torch.no_grad():
        weighted = model.log_likelihood(test[:IMPORTANCE], samples, noise=Noise(2, "weighted"))
        bound = model.evaluate(test[:IMPORTANCE], noise=Noise(1, "elbo")).elbo
    row = {
        "posterior": posterior, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "negative_elbo": -found.elbo,
        "standard_error": found.standard_error, "kl": found.kl, "nfe": found.nfe, "importance_samples": samples,
        "gain": float((weighted - bound).mean()), "cpu_seconds": time.process_time() - begun,
    }  # fmt: skip
    return row, model


def draw(models: dict[str, FlowVAE], test: torch.Tensor, path: Path) -> None:
    """Draw data, reconstructions and samples of each model."""
    figure = new_figure(3.2 * (1 + len(models)), 6.6)
    axes = subplots(figure, 2, 1 + len(models))
    columns = [("data", test[:16], test[16:32])]
    columns += [(name, model.reconstruct(test[:16], noise=Noise(0)), model.sample(16, noise=Noise(0))) for name, model in models.items()]
    for (top, bottom), (name, first, second) in zip(axes.T, columns, strict=True):
        for axis, images in ((top, first), (bottom, second)):
            axis.imshow(tiles(images, None, 256), interpolation="nearest")
            axis.set_axis_off()
        top.set_title(name if name == "data" else f"{name}: reconstructions")
        bottom.set_title("further data" if name == "data" else f"{name}: samples")
    save_figure(figure, path)


def table(rows: Sequence[Row]) -> str:
    """Return means (and standard deviations over seeds) by posterior."""
    lines = []
    for name in dict.fromkeys(row["posterior"] for row in rows):
        some = [row for row in rows if row["posterior"] == name]
        forms = {"negative_elbo": ".2f", "standard_error": ".2f", "kl": ".2f", "gain": ".2f", "nfe": ".0f", "cpu_seconds": ".0f"}
        line = {"posterior": name, "parameters": some[0]["parameters"], "seeds": len(some), "samples": some[0]["importance_samples"]}
        lines.append(line | {key: spread([row[key] for row in some], form) for key, form in forms.items()})
    return markdown(lines, {
        "posterior": "{posterior}", "parameters": "{parameters:,}", "seeds": "{seeds}", "negative ELBO, nats": "{negative_elbo}",
        "standard error over images": "{standard_error}", "KL": "{kl}", f"log p by {lines[0]['samples']} weighted draws, above the ELBO": "{gain}",
        "NFE": "{nfe}", "CPU s": "{cpu_seconds}",
    })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a named set of images (default: %(default)s)")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--posteriors", choices=POSTERIORS, nargs="+", default=list(POSTERIORS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--importance", type=int, default=50, help="weighted draws of z (default: %(default)s; the paper's code has 5,000)")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, 5 weighted draws")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    seeds, steps, samples = (1, 20, 5) if options.quick else (options.seeds, options.steps, options.importance)
    torch.set_num_threads(1)
    options.pictures.mkdir(parents=True, exist_ok=True)
    splits = load(options.data, root=options.data_root)
    parts = [binarised(x, splits.levels or 256, i) for i, x in enumerate((splits.train, splits.validation, splits.test))]
    rows: list[Row] = []
    models: dict[str, FlowVAE] = {}
    for name in options.posteriors:
        for seed in range(seeds):
            row, model = run(name, seed, steps, parts, samples)
            rows.append(row)
            models.setdefault(name, model)
            print(f"{name}, seed {seed}: {row['negative_elbo']:.2f} ± {row['standard_error']:.2f} nats, {row['cpu_seconds']:.0f} CPU s", flush=True)
    draw(models, parts[2], options.pictures / f"vae-{options.data}.png")
    record(options.out, f"vae_flows {options.data}", arguments, rows, {**machine(), "versions": versions("torch", "torchdiffeq")})
    print(table(rows))


if __name__ == "__main__":
    main()
