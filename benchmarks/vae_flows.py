"""Variational autoencoders with six posteriors on five sets of images (FFJORD, 1810.01367).

    python benchmarks/vae_flows.py                                                        # real 8x8 digits, 400 steps
    python benchmarks/vae_flows.py --data mnist --steps 2000 --runs runs                  # binarised MNIST
    python benchmarks/vae_flows.py --data omniglot --data-root data --posteriors cnf-rank # FFJORD's files: see data/README.md
    python benchmarks/vae_flows.py --data mnist --posteriors cnf-rank --published         # the published system, days of a GPU

Posteriors: a normal; planar flows, inverse autoregressive flows (IAF, by zuko) and Sylvester flows, whose parameters the encoder
gives; a CNF that is the same for all data (``cnf``); a CNF whose weights the encoder updates by a low rank (``cnf-rank``).
Prints the negative evidence lower bound of the test images with its standard error over images (and over seeds, if there
are several), the KL term, and by how much the importance-weighted likelihood of a few images is above the bound.

Each training is a run folder, RUNS/vae-DATA/POSTERIOR-SEED: checkpoints, metrics.jsonl, report.html, result.json, and data,
reconstructions and samples in plots/reconstructions.png. ``--resume`` continues those that are there, to the same bits.
``cnf.load(folder, flow=model)`` reads the weights into a model of benchmarks/vae_parts.py.

The default is a plain design: perceptrons of two hidden layers, 16 latents (8 for digits), one CNF with updates of rank 8. Frey
faces have 256 grey levels, whose bound is also given in bits/dim. ``--quick``: one seed, 20 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from measure import RESULTS, machine, markdown, record, spread, versions
from vae_parts import POSTERIORS, Design, build

import cnf
from cnf.data import DataSplits, load
from cnf.errors import CNFError, ConfigError
from cnf.losses.elbo import ELBO, estimate_elbo
from cnf.ode.divergence import Exact
from cnf.plotting import reconstructions
from cnf.random import Noise
from cnf.vae import FlowVAE

# of the released script: gated convolutions, two CNFs, updates of rank 64, batches of 100; Adamax, 100 epochs of warm-up
PUBLISHED = Design("conv", 64, 256, (1024, 1024), 64, 2, 16)
PUBLISHED_EPOCHS, PUBLISHED_WARMUP = 2000, 100
BINARIZE = {"digits": "once", "mnist": "once", "fashion-mnist": "once", "omniglot": "redraw", "freyfaces": "no", "caltech": "no"}
SHOWN = 32  # images of a picture
Row = dict[str, Any]


def train(model: FlowVAE, images: DataSplits, seed: int, folder: Path, options: argparse.Namespace) -> float:
    """Train a model in a run folder; return the seconds of training, over all calls."""
    loss = ELBO(model, options.warmup, images.train_levels)
    adamax = (lambda p: torch.optim.Adamax(p, options.lr, eps=1e-7)) if options.published else None
    return cnf.fit(
        model, images.train, validation=images.validation[: options.validation_items], loss=loss, steps=options.steps, batch_size=options.batch_size, lr=options.lr,
        optimizer=adamax, validate_every=options.validate_every, seed=seed, quiet=True, folder=folder, device=options.device,
        resume=options.resume and (folder / "config.json").exists(),
    ).seconds  # fmt: skip


def run(posterior: str, seed: int, images: DataSplits, folder: Path, options: argparse.Namespace) -> tuple[Row, FlowVAE]:
    """Return the figures of one training, and the model."""
    begun = time.process_time()
    torch.manual_seed(seed)
    model = build(posterior, images.event_shape, images.levels or 2, options.design)
    seconds = train(model, images, seed, folder, options)
    for block in model.blocks:
        block.divergence = Exact()  # the published tests have the exact trace, too
    trained = time.process_time() - begun
    found = estimate_elbo(model, images.test, draws=2, seed=1)
    few = images.test[: options.importance_images].to(model.like.device)
    with torch.no_grad():
        weighted = torch.cat([model.log_likelihood(x[None], options.importance_samples, noise=Noise(2, "weighted", i)) for i, x in enumerate(few)])
        bound = estimate_elbo(model, few, draws=10, seed=3).elbo
    row = {
        "data": options.data, "posterior": posterior, "seed": seed, "steps": options.steps, "parameters": sum(p.numel() for p in model.parameters()),
        "negative_elbo": -found.elbo, "standard_error": found.standard_error, "noise_standard_error": found.noise_standard_error, "kl": found.kl,
        "bits_per_dim": -found.elbo / images.test[0].numel() / math.log(2), "nfe": found.nfe, "test_items": len(images.test),
        "importance_samples": options.importance_samples, "importance_images": len(few), "log_likelihood": float(weighted.mean()),
        "log_likelihood_standard_error": float(weighted.std() / len(few) ** 0.5), "gain": float(weighted.mean()) - bound,
        "training_seconds": seconds, "training_cpu_seconds": trained, "cpu_seconds": time.process_time() - begun,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    (folder / "plots").mkdir(exist_ok=True)
    reconstructions({posterior: model}, images.test[:SHOWN], folder / "plots" / "reconstructions.png")
    return row, model


def table(rows: Sequence[Row]) -> str:
    """Return means (and standard deviations over seeds) by posterior."""
    lines = []
    for name in dict.fromkeys(row["posterior"] for row in rows):
        some = [row for row in rows if row["posterior"] == name]
        forms = {
            "negative_elbo": ".2f", "bits_per_dim": ".3f", "standard_error": ".2f", "kl": ".2f", "gain": ".2f", "nfe": ".0f",
            "training_cpu_seconds": ".0f", "cpu_seconds": ".0f",
        }  # fmt: skip
        line = {"posterior": name, "parameters": some[0]["parameters"], "seeds": len(some)}
        lines.append(line | {key: spread([row[key] for row in some], form) for key, form in forms.items()})
    bits = {"bits/dim": "{bits_per_dim}"} if rows[0]["data"] == "freyfaces" else {}
    return markdown(lines, {
        "posterior": "{posterior}", "parameters": "{parameters:,}", "seeds": "{seeds}", "negative ELBO, nats": "{negative_elbo}", **bits,
        "standard error over images": "{standard_error}", "KL": "{kl}",
        f"log p by {rows[0]['importance_samples']:,} weighted draws, above the ELBO": "{gain}", "NFE": "{nfe}",
        "CPU s, training": "{training_cpu_seconds}", "CPU s": "{cpu_seconds}",
    })  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options with all sizes filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BINARIZE, default="digits", help="(default: %(default)s)")
    parser.add_argument("--data-root", default="data", help="folder of the files, see data/README.md (default: %(default)s)")
    parser.add_argument("--posteriors", choices=POSTERIORS, nargs="+", default=list(POSTERIORS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="(default: 400; with --published 2,000 epochs)")
    parser.add_argument("--network", choices=("mlp", "conv"), help="perceptrons, or the published gated convolutions (default: mlp)")
    parser.add_argument("--latent", type=int, help="number of latents (default: 16, for digits 8; with --published 64)")
    parser.add_argument("--batch-size", type=int, help="(default: 64; with --published 100)")
    parser.add_argument("--lr", type=float, help="(default: 2e-3; with --published 5e-4)")
    parser.add_argument("--published", action="store_true", help="sizes, optimiser and lengths of FFJORD's script")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validation-items", type=int, default=2000, help="images of a validation (default: %(default)s)")
    parser.add_argument("--test-items", type=int, help="the first so many test images (default: all)")
    parser.add_argument("--importance-samples", type=int, default=50, help="weighted draws of z (default: %(default)s; the paper's code has 5,000)")
    parser.add_argument("--importance-images", type=int, default=64, help="number of images of the weighted likelihood (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder of the run folders (default: a temporary one)")
    parser.add_argument("--resume", action="store_true", help="continue the run folders that are there")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, 5 weighted draws")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.resume and options.runs is None:
        parser.error("--resume continues the runs of a folder: give --runs")
    if options.quick:
        options.seeds, options.steps, options.importance_samples = 1, 20, 5
    return options


def fill(options: argparse.Namespace, rows: int) -> None:
    """Set the sizes that depend on the data and on --published."""
    plain = Design("mlp", 8, 128) if options.data == "digits" else Design()
    design = PUBLISHED if options.published else plain
    chosen = {"network": options.network, "latent": options.latent}
    options.design = Design(**(vars(design) | {key: value for key, value in chosen.items() if value is not None}))
    options.batch_size = options.batch_size or (100 if options.published else 64)
    epoch = max(1, rows // options.batch_size)
    options.steps = options.steps or (PUBLISHED_EPOCHS * epoch if options.published else 400)
    options.lr = options.lr or (5e-4 if options.published else 2e-3)
    options.warmup = PUBLISHED_WARMUP * epoch if options.published else options.steps // 4
    options.validate_every = epoch if options.published else max(1, options.steps // 5)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.pictures.mkdir(parents=True, exist_ok=True)
    images = load(options.data, root=options.data_root, binarize=BINARIZE[options.data])
    images = dataclasses.replace(images, test=images.test[: options.test_items])
    fill(options, len(images.train))
    for name in () if options.runs is None or options.resume else options.posteriors:
        if (folder := options.runs / f"vae-{options.data}" / f"{name}-0").exists():
            raise ConfigError(f"{folder} exists: --resume continues it, another --runs begins anew")
    rows: list[Row] = []
    models: dict[str, FlowVAE] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.posteriors:
            for seed in range(options.seeds):
                folder = (options.runs or Path(temporary)) / f"vae-{options.data}" / f"{name}-{seed}"
                row, model = run(name, seed, images, folder, options)
                rows.append(row)
                models.setdefault(name, model)
                print(f"{name}, seed {seed}: {row['negative_elbo']:.2f} ± {row['standard_error']:.2f} nats, {row['cpu_seconds']:.0f} CPU s", flush=True)
    reconstructions(models, images.test[:SHOWN], options.pictures / f"vae-{options.data}.png")
    record(options.out, f"vae_flows {options.data}", arguments, rows, {**machine(), "versions": versions("torch", "torchdiffeq", "zuko")})
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except CNFError as error:
        sys.exit(f"vae_flows.py: {error}")
