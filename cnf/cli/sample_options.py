"""Options of sampling; parsing them imports no torch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cnf._utils.errors import ConfigError
from cnf.cli.help import OUTPUT

__all__ = ["ENDINGS", "FRAMES", "IMAGES", "METHODS", "MULTISTEP", "VECTORS", "check", "parser"]

ENDINGS = (".csv", ".parquet")
SUFFIXES = (".png", ".npz", ".gif", *ENDINGS)
METHODS = ("dopri5", "euler", "heun", "midpoint", "rk4", "rk4-classic")  # sorted(cnf.solvers.TABLEAUS)
MULTISTEP = ("unipc", "dpm++")  # cnf.solvers.ExponentialMultistep.METHODS
QUALITIES = ("draft", "default", "exact")
IMAGES, VECTORS = 64, 1000  # default numbers of samples
FRAMES = 21  # time points of --trajectory
MOST_STEPS = 100_000
EXAMPLES = (
    ("pretrained:fm-mnist --quality draft", "the packaged model"),
    ("runs/digits-0 -n 100 --out digits.png", "a picture"),
    ("runs/tabular-table-0 -n 1000 --out new.csv", "rows with the columns of your table"),
)


def parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of the program under this name."""
    examples = "\n".join(f"  {program} {words}  # {what}" for words, what in EXAMPLES)
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"Draw samples from a trained run.\n\nexamples:\n{examples}",
        epilog=OUTPUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run folder, or pretrained:fm-mnist, which comes with the package")
    add("-n", type=int, help=f"number of samples (default: {IMAGES} images, {VECTORS} points or rows)")
    add("--out", metavar="FILE", type=Path, help="output file (default: RUN/samples/sample-SEED.png; pretrained:NAME: in runs/NAME-pretrained). .png: images, or a plot of the "
        "samples next to the data if available; .csv, .parquet: a table with the column names and types of the run's; .npz: arrays "
        "samples, log_prob (nats), classes of a conditional run, columns of a table; .gif: the flow from noise to samples")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="scale of the latent noise; below 1 more typical samples, above 1 more varied ones "
        "(default: %(default)s)")  # fmt: skip
    add("--quality", choices=QUALITIES, help="draft or default: for denoisers (presets such as fm-mnist), 6 or 12 evaluations of the "
        "multistep solver unipc; exact: the run's adaptive solver at its tolerances (default: default for a denoiser, exact otherwise and for "
        "a .gif); log_prob and --trajectory always use the run's solver")  # fmt: skip
    add("--grid-steps", type=int, metavar="N", help="instead of --quality: N solver steps of a fixed grid in each block; for a denoiser at equal "
        "steps of a power of the noise")
    add("--method", default="rk4", choices=(*METHODS, *MULTISTEP), help="method of --grid-steps; unipc and dpm++ are for denoisers "
        "(default: %(default)s)")  # fmt: skip
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="precision of the field while samples are drawn, bf16 with any but "
        "the adaptive solver (default: %(default)s)")  # fmt: skip
    add("--class", dest="label", metavar="NAME", help="runs with --condition label: class of the samples (default: "
        "every class in turn)")  # fmt: skip
    add("--given", metavar="NAME=VALUE,...", help="runs with --condition COLUMNS: sample p(others | these), such as x=1.5,z=low")
    add("--guidance", type=float, metavar="W", help="runs with --condition that were trained with --drop-condition: exaggerate the condition W times "
        "(classifier-free guidance, two evaluations in place of one); 1.5 to 4 is usual, log_prob is that of the guided samples")  # fmt: skip
    add("--trajectory", action="store_true", help=f".npz: also the path from noise to each sample, array trajectory ({FRAMES}, n, "
        "...) in the coordinates of the ODE, at the times in array times (1 noise, 0 data); the scales of a multiscale flow move one "
        "after another")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    return parser


def check(options: Any) -> None:
    """Check the options' values.

    Raises:
        ConfigError: for the first invalid one.
    """
    if options.n is not None and options.n < 1:
        raise ConfigError(f"-n {options.n}: expected at least 1 sample")
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        raise ConfigError(f"--temperature {options.temperature:g}: expected a positive number, such as 0.8")
    if options.grid_steps is not None and not 1 <= options.grid_steps <= MOST_STEPS:
        raise ConfigError(f"--grid-steps {options.grid_steps}: expected 1 to {MOST_STEPS:,} steps")
    if options.quality is not None and options.grid_steps is not None:
        raise ConfigError(f"--quality {options.quality} and --grid-steps {options.grid_steps} both choose the solver: give one of them")
    if options.grid_steps is None and options.method != "rk4":
        raise ConfigError(f"--method {options.method} is for --grid-steps N: give both, or neither")
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise ConfigError(f"--guidance {options.guidance}: expected a finite number, such as 2")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: expected zero or more")
    if options.out is not None and options.out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {options.out}: expected a file ending in {', '.join(SUFFIXES)}")
    if options.trajectory and (options.out is None or options.out.suffix != ".npz"):
        raise ConfigError("--trajectory is for --out FILE.npz; a .gif shows the way too")
