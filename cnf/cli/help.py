"""Short help: examples and the common options of each command."""

from __future__ import annotations

from collections.abc import Sequence

from cnf.cli.listing import columns
from cnf.cli.spelling import option
from cnf.config import PRESETS, RunConfig
from cnf.config.tagged import schema, values

__all__ = ["COMMANDS", "OUTPUT", "overview", "short_help"]

OUTPUT = "--quiet prints warnings and the result only, --json one JSON object a line; both are for every command"

COMMANDS = {
    "train": "train a density, a predictor or an autoencoder, test it, and leave a run folder",
    "evaluate": "score a run again: another solver, trace, split or data",
    "rank": "rank your own items by likelihood under a run",
    "sample": "draw samples from a run",
    "compare": "tabulate several runs and draw their curves",
    "sweep": "train a grid of settings",
    "list": "list the presets, or the published models",
}

EXAMPLES = {
    "train": (
        ("cnf train", "digits, by flow matching, in a few minutes"),
        ("cnf train --data table.csv --minutes 10", "your own table"),
        ("cnf train demo --data 2spirals", "a density in the plane, in a minute"),
        ("cnf train anode-digits", "a neural ODE that classifies"),
        ("cnf train vae-digits", "an autoencoder with a flow as posterior"),
        ("cnf train --resume --out runs/digits-0 --steps 5000", "continue a run"),
    ),
    "evaluate": (
        ("cnf evaluate runs/digits-0 --importance 16", "a tighter bound"),
        ("cnf evaluate runs/digits-0 --check --eval-rtol 1e-7 --eval-atol 1e-7", "a more exact solver"),
        ("cnf evaluate pretrained:fm-mnist --split validation --test-items 100", "the packaged model"),
    ),
    "rank": (("cnf rank runs/tabular-table-0 new.csv", "least likely rows first"),),
    "sweep": (("cnf sweep digits --sweep lr=1e-3,3e-4 seed=0,1,2 --steps 500", "six runs and one table"),),
    "list": (("cnf list", "presets by task"), ("cnf list --published", "parameter counts of the published models")),
}

TRAIN = {
    "data": "data set by name, or your own file or folder",
    "condition": "label, or columns of a table, to condition on",
    "objective": "likelihood, flow-matching, both, regression, classification, elbo",
    "hidden": "widths (or channels) of the hidden layers",
    "latent": "vae: dimension of the latent z",
    "posterior": "vae: normal, cnf, or cnf-rank, a CNF whose weights the encoder updates",
    "blocks": "number of CNF blocks",
    "steps": "optimiser steps",
    "batch_size": "rows of a step",
    "lr": "peak learning rate",
    "validate_every": "steps between validations",
    "patience": "stop after so many validations without a better one; 0 never",
    "minutes": "tables and points: search and train within so many minutes",
    "max_time": "train for so many seconds at most",
    "seed": "seed of weights, order and noise",
    "device": "cpu, cuda, cuda:1, ...",
}
RUN_OPTIONS = (
    ("--out DIR", "run folder, new or empty", "runs/PRESET-SEED"),
    ("--resume", "continue the run in --out", ""),
    ("--config FILE", "settings from a .json or .yaml file; options override it", ""),
    ("--dry-run", "print parameters, memory and time per step, and stop", ""),
)
EVALUATE = (
    ("--split NAME", "test, validation or train", "test"),
    ("--data DATA", "other data of the same shape", "the run's"),
    ("--test-items N", "score a random subset", "the run's"),
    ("--noise-samples N", "noise draws for each row", "the run's"),
    ("--importance K", "images: samples of the importance-weighted bound (vae: of the likelihood)", "1"),
    ("--importance-images N", "vae: number of images of that likelihood", "64"),
    ("--mid-bin", "images: score the middle of each grey level; not a bound", ""),
    ("--check", "solve every row again, ten times tighter", "a tenth"),
    ("--eval-method NAME", "adaptive solver", "the run's"),
    ("--eval-rtol, --eval-atol", "its tolerances", "the run's"),
    ("--divergence NAME", "exact or hutchinson", "the run's"),
    ("--per-item FILE", "also write each row's value (.npz or .csv)", ""),
    ("--device NAME", "cpu, cuda, cuda:1, ...", "the run's"),
)
EVALUATE_MORE = (
    ("--eval-tolerance X", "error of the log-det per dimension; 0 integrates at every solver stage", "the run's"),
    ("--likelihood-solver NAME", "adams (denoisers: exponential Adams) or adaptive", "the run's"),
    ("--likelihood-steps N, --likelihood-order N", "its steps and order", "the run's"),
    ("--likelihood-tolerance X", "its error in bits/dim, above which a batch is solved in more steps", "the run's"),
    ("--hutchinson-noise NAME", "distribution of the probes: rademacher or gaussian", "the run's"),
    ("--hutchinson-mode NAME", "derivative of the probes: forward or reverse", "the run's"),
    ("--probes N", "probes for each row", "the run's"),
    ("--data-root DIR", "folder of the named data sets", "the run's"),
    ("--download", "allow downloads of named data sets", ""),
    ("--threads N", "CPU threads", "the run's"),
    ("--field FILE.py:CLASS", "the run's own field, given again", ""),
)
OPTIONS = {
    "evaluate": EVALUATE,
    "rank": tuple(row for row in EVALUATE if row[0].split()[0] not in ("--split", "--data", "--test-items", "--check", "--importance-images")),
    "sweep": (
        ("--sweep NAME=V1,V2 ...", "the grid: every combination of these values is a run", ""),
        ("--out DIR", "folder of the runs and of sweep.csv", "runs/sweep-PRESET"),
        ("--OPTION VALUE", "any option of cnf train, for all runs", ""),
    ),
    "list": (("--published", "the published models and their parameters", ""),),
}
MORE = {  # --help-all
    "evaluate": EVALUATE_MORE,
    "rank": tuple(row for row in EVALUATE_MORE if row[0].split()[0] not in ("--data-root", "--download")),
}
USAGE = {
    "train": "[PRESET] [--options]",
    "evaluate": "RUN [--options]",
    "rank": "RUN PATH [PATH ...] [--options]",
    "sweep": "[PRESET] --sweep NAME=V1,V2 [NAME=V1,V2 ...] [--options]",
    "list": "[--published]",
}


def overview() -> str:
    """Return the help of the program itself."""
    lines = ["usage: cnf COMMAND [--options]", "", "Continuous normalizing flows: train, evaluate, sample.", "", "commands:"]
    lines += columns((f"  {name}", what) for name, what in COMMANDS.items())
    return "\n".join([*lines, "", "examples:", *_examples("train"), "", OUTPUT, "cnf COMMAND --help shows a command's options; cnf --version"])


def short_help(program: str, words: Sequence[str] = ()) -> str:
    """Return the help of a command or script: its common options, with the defaults of a preset among ``words``.

    With ``--help-all`` among the words, also the other options of ``evaluate`` and ``rank``.
    """
    command = program.removeprefix("cnf ") if program.startswith("cnf ") else "train"
    about, everything = COMMANDS[command], "--help-all" in words
    lines = [f"usage: {program} {USAGE[command]}", "", f"{about[0].upper()}{about[1:]}.", "", "examples:", *_examples(command)]
    if command == "train":
        name = next((word for word in words if word in PRESETS), "anode-digits" if "classifier" in program else "fm-digits")
        lines += ["", f"options (defaults of preset {name}; cnf list shows the presets):"]
        lines += columns((*_train_options(PRESETS[name].config), *((f"  {o}", w, d) for o, w, d in RUN_OPTIONS)))
    else:
        rows = OPTIONS[command] + (MORE.get(command, ()) if everything else ())
        lines += ["", "options:", *columns((f"  {o}", w, d) for o, w, d in rows)]
    lines += ["", OUTPUT]
    if command != "list":
        lines += [("" if everything else "--help-all shows every option; ") + "exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted but saved"]
    return "\n".join(lines)


def _examples(command: str) -> list[str]:
    return columns((f"  {words}", f"# {what}") for words, what in EXAMPLES[command])


def _train_options(config: RunConfig) -> list[tuple[str, str, str]]:
    named = {each.name: each.value for each in values(config)}
    kinds = {name: str(places[0].field.type) for name, places in schema((RunConfig,)).items()}
    rows = []
    for name, what in TRAIN.items():
        if name not in named or (name == "minutes" and named[name] is None):
            continue
        value = named[name]
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
        kind = next((word for word in ("int", "float") if word in kinds[name]), "str")
        word = {"int": "N", "float": "X", "str": "VALUE"}[kind] + (" ..." if isinstance(value, tuple) else "")
        rows.append((f"  {option(name)} {word}", what, shown))
    return rows
