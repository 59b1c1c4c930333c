"""Command line options of training and evaluation: parsing, default presets and checks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cnf._utils.errors import ConfigError
from cnf.cli.setting_options import all_settings, show_help
from cnf.cli.spelling import given_settings, option, renamed, spelled
from cnf.config import PRESETS, NeuralODEConfig, RunConfig, preset, read_settings
from cnf.config.results import CAUTION
from cnf.config.rules import SettingError, lenient

if TYPE_CHECKING:  # parsing and --help need no torch
    from cnf.runs import RunInfo

__all__ = ["CLASSIFIER", "DEFAULT", "Command", "fitting", "parse", "refuse_meaningless", "renamed", "suited"]

DEFAULT = "fm-digits"
CLASSIFIER = "anode-digits"  # default preset of train_classifier.py
# default presets by the name of --data, before loading, and by kind of data, after loading
_REGRESSIONS = {"identity": "anode-flip", "flip": "anode-flip"} | dict.fromkeys(
    ("spheres", "separable2", "shifted-sines"), "anode-spheres"
)
SUITED = _REGRESSIONS | {"mnist": "fm-mnist", "cifar10": "fm-cifar10"} | {name: f"vae-{name}" for name in ("omniglot", "freyfaces", "caltech")}
SUITED_CLASSIFIER = _REGRESSIONS | {
    "three-spheres": "anode-three-spheres", "disjoint-spheres": "anode-three-spheres", "mnist": "anode-mnist",
    "cifar10": "anode-cifar10", "svhn": "anode-svhn", "tiny-imagenet": "anode-tiny-imagenet",
}  # fmt: skip
FITTING = {"table": "tabular", "toy": "ffjord-toy"}
FITTING_CLASSIFIER = {"table": "anode-three-spheres"}
LARGE = 16  # pixels: smallest image side for fm-mnist; smaller images use fm-digits
PRESET_HINT = (
    f"(default: {DEFAULT}, of train_classifier.py {CLASSIFIER}; with --data table for tables, demo for points, "
    "fm-digits, fm-mnist or digits for images, by their size)"
)
Flag = tyro.conf.FlagCreatePairsOff[bool]

EVALUATIONS = ("split", "importance", "importance_images", "mid_bin", "check", "per_item", "score")  # options of --evaluate only

SCORE_HELP = (  # a string, since tyro keeps the line ends of a docstring
    "--evaluate: rank custom rows or images instead of a split, least likely first: .npz, .npy, tables, images, folders. " + CAUTION
)


@dataclasses.dataclass(frozen=True)
class Command:
    """Train a density (a continuous normalizing flow, which sample.py draws from), a neural ODE that predicts (presets node-...,
    anode-...) or an autoencoder (vae-...) on data, test it, and leave a run folder.

    PRESET sets the defaults shown here; cnf list shows the presets. --quiet prints warnings and the result only, --json one JSON
    object a line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted but saved.
    """

    config: tyro.conf.OmitArgPrefixes[RunConfig]
    preset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PRESET]", help_behavior_hint=PRESET_HINT)] = None
    """Preset with the defaults; cnf list shows the presets."""
    settings: Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """Settings from a .json or .yaml file (or a run's config.json); options on the command line override it."""
    out: Path | None = None
    """Run folder; by default runs/PRESET-SEED. It must be new or empty."""
    resume: Flag = False
    """Continue the run in --out where it stopped. Only --steps, --patience, --max-time, --device, --threads, --accumulate, --compile, --compile-unit, --data-root, --download, and --data for the same data elsewhere, may change."""
    evaluate: Path | None = None
    """Evaluate this run (or pretrained:fm-mnist) without training, with another solver, tolerances, trace, --noise-samples, --test-items, --split or --data."""
    split: Literal["test", "validation", "train"] = "test"
    """Split that --evaluate scores."""
    importance: int = 1
    """--evaluate, images: noise samples K of the importance-weighted bound; 1 is the plain bound. vae: draws of z of the importance-weighted likelihood, next to the bound."""
    importance_images: int = 64
    """--evaluate, vae: number of images of the importance-weighted likelihood."""
    mid_bin: Flag = False
    """--evaluate, images: score the middle of each grey level, as RNODE reports; not a bound."""
    check: Flag = False
    """--evaluate: solve every row again at tolerances ten times tighter, and round trip; default: a tenth of the rows."""
    per_item: Path | None = None
    """--evaluate: also write the likelihood (or the prediction) of each row to this .npz or .csv file."""
    score: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="PATH [PATH ...]", help=SCORE_HELP)] = None
    dry_run: Flag = False
    """Print parameters, memory and time per step, and stop."""


def suited(default: str, data: str) -> str | None:
    """Return the default preset for a data set by name, or None for the program's default."""
    name = re.sub(r"^spheres\d+$", "spheres", data)  # spheres in any dimension
    return (SUITED_CLASSIFIER if default == CLASSIFIER else SUITED).get(name)


def fitting(default: str, kind: str, shape: tuple[int, ...]) -> str | None:
    """Return the default preset for data of this kind and event shape, or None for the program's default.

    Example:
        >>> fitting("fm-digits", "table", (5,)), fitting("fm-digits", "image", (3, 32, 32))
        ('tabular', 'fm-mnist')
        >>> fitting("fm-digits", "image", (1, 7, 7))
        'digits'
    """
    if default == CLASSIFIER:
        return FITTING_CLASSIFIER.get(kind)
    if kind != "image":
        return FITTING.get(kind)
    # the U-Net halves its images, twice from 16 pixels on, where it squeezes them first
    if min(shape[1:]) >= LARGE and not any(n % 4 for n in shape[1:]):
        return "fm-mnist"
    return "digits" if any(n % 2 for n in shape[1:]) else None


def _read(arguments: Sequence[str], program: str) -> tuple[Command, dict[str, Any]]:
    """Parse a command line without checks; return the command, and the values of all settings."""
    everything, flat = all_settings(), tyro.conf.OmitArgPrefixes
    kind: Any = dataclasses.make_dataclass("Command", [("config", flat[everything])], bases=(Command,), frozen=True)
    kind.__doc__ = Command.__doc__
    found = tyro.cli(kind, default=kind(everything()), args=arguments, prog=program)
    return Command(**vars(found) | {"config": RunConfig()}), vars(found.config)


def _spell(error: SettingError) -> ConfigError:
    value = "" if isinstance(error.value, bool) else f" {' '.join(map(str, error.value)) if isinstance(error.value, tuple) else error.value}"
    joint = " " if error.why.startswith("is ") else ": "
    return ConfigError(f"{option(error.name)}{value}{joint}{spelled(error.why)}")


def refuse_meaningless(config: RunConfig, given: Collection[str], **facts: Any) -> None:
    """Reject settings that the user gave and that do nothing in this run (see :meth:`~cnf.config.RunConfig.meaningless`).

    Raises:
        ConfigError: for the first such setting; the message says which runs it is for.
    """
    if (found := config.meaningless(given, **facts)) is not None:
        name, default, words = found
        raise ConfigError(f"{option(name)} is for {spelled(words)}: leave it at {default}")


def parse(
    arguments: Sequence[str], fallback: str = DEFAULT, program: str = "cnf train", *, settled: bool = True
) -> tuple[Command, frozenset[str], RunInfo | None]:
    """Parse a command line; return the command, the settings that the user gave, and the run that it resumes or evaluates.

    Args:
        arguments: command line arguments.
        fallback: default preset.
        program: name of the program in messages of the parser.
        settled: the fallback is final; else the data choose the preset later, and what depends on it is not checked.

    Raises:
        ConfigError: for an unknown preset, mutually exclusive options, settings that cannot be or do nothing, an
            unusable file of settings, or a folder that is not a run.
        SystemExit: from the parser, for wrong usage (2) or help (0).
    """
    first, read = _read([word for word in arguments if word not in ("-h", "--help")], program)
    typed = given_settings(arguments) & read.keys()
    named = {name: value for name, value in read.items() if name in typed}
    _exclude(first)
    facts: dict[str, Any] = {}
    info, name = None, first.preset
    otherwise: Mapping[str, Any] = {}
    if first.resume or first.evaluate:
        from cnf.cli.common import read_run

        folder = first.evaluate or first.out
        assert folder is not None
        info = read_run(folder)
        start = info.config
        if name not in (None, start.name):
            raise ConfigError(f"{folder} is a run of preset {start.name}, not {name}: leave the preset out")
        if first.importance_images != Command.importance_images and start.train.model_kind != "autoencoder":
            raise ConfigError(f"--importance-images {first.importance_images} is for autoencoders, and {folder} is none: leave it out")
    elif first.settings is not None:
        start, written = read_settings(first.settings, name, fallback)
        name, named, otherwise = name or start.name, written | named, preset(start.name).otherwise if start.name in PRESETS else {}
    else:
        _refuse_data(name)
        entry = preset(name or fallback)
        start, otherwise = entry.config, entry.otherwise
        if "data" in typed:
            _refuse_preset(named["data"])
        else:
            facts["events"] = "vectors" if entry.levels is None else "images"
    unsure = not settled and name is None and info is None
    try:
        with lenient():
            config = start.complete(named, otherwise, strict=not unsure)
            config = _timed(config, named)
        if {"-h", "--help"} & set(arguments):
            show_help(Command, config, program, config.tags(**facts))
        config.change()  # strictly
    except SettingError as error:
        raise _spell(error) from None
    command = dataclasses.replace(first, config=config, preset=name)
    if not unsure:
        refuse_meaningless(config, named, **facts)
    return command, frozenset(named), info


def _refuse_preset(data: str) -> None:
    """Refuse a preset in the place of data."""
    if data in PRESETS and not Path(data).exists():
        from cnf.data import names as data_names

        if data not in data_names():
            raise ConfigError(f"--data {data}: {data!r} is a preset, not data: write cnf train {data}")


def _refuse_data(name: str | None) -> None:
    """Refuse data in the place of a preset, and a name that is closer to a data set than to a preset."""
    if name is None or name in PRESETS:
        return
    from cnf.data import names as data_names  # needs torch

    if name in data_names() or Path(name).exists():
        raise ConfigError(f"{name!r} is data, not a preset: write --data {name}")
    if Path(name).suffix or len(Path(name).parts) > 1:
        raise ConfigError(f"{name!r} is neither a preset nor a file: there is none at {Path(name).resolve()}; write --data FILE for data")
    near = get_close_matches(name, [*PRESETS, *data_names()], 1)
    if near and near[0] not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown: did you mean --data {near[0]}? (cnf list shows the presets)")


def _timed(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Return the settings with a time-dependent field if ``given`` requests adaptive depth.

    A scalar field without time has one direction at each point, so that with T(x) > 0 no point can pass another: flip
    stays at a squared error of 1. Signed T(x) would suffice in theory, but training failed in three of three runs.
    """
    model = config.model
    if not isinstance(model, NeuralODEConfig) or not model.adaptive_depth or {"adaptive_depth", "time_conditioning"} & set(given) != {"adaptive_depth"}:
        return config
    if model.depth.kind in ("chebyshev", "fourier") or model.field.time_conditioning != "ignore":
        return config
    return config.change(time_conditioning="concat")


def _exclude(command: Command) -> None:
    if str(command.out or "").startswith("pretrained:"):
        raise ConfigError(f"--out {command.out}: a name with pretrained: is a model of the package's, which is not trained on; give a folder")
    if command.settings and (command.resume or command.evaluate):
        raise ConfigError(f"--config {command.settings} is for a new run: a run folder has its own settings")
    if command.resume and command.out is None:
        raise ConfigError("--resume needs --out DIR: the run folder to continue")
    if command.evaluate and (command.resume or command.dry_run or command.out):
        other = "--resume" if command.resume else "--dry-run" if command.dry_run else "--out"
        raise ConfigError(f"{other} does not apply to --evaluate, which writes into the folder that it scores")
    plain = Command(command.config)
    used = [name for name in EVALUATIONS if getattr(command, name) != getattr(plain, name)]
    if used and not command.evaluate:
        raise ConfigError(f"{option(used[0])} is for --evaluate: a training is always tested once, on the test split")
    if command.importance < 1:
        raise ConfigError(f"--importance {command.importance}: expected at least 1 sample")
    if command.importance_images < 1:
        raise ConfigError(f"--importance-images {command.importance_images}: expected at least 1 image")
    if command.importance == 1 and "importance_images" in used:
        raise ConfigError(f"--importance-images {command.importance_images} is for --importance K, the draws of z for each of them: give both, or neither")
    if command.mid_bin and command.importance > 1:
        raise ConfigError(f"--importance {command.importance} weights noise, and --mid-bin has none: leave one out")
    if command.score == ():
        raise ConfigError("--score names no file: give .npz, .npy, tables (.csv, .parquet, ...), pictures or folders of them")
    if command.score and (idle := [name for name in ("split", "check") if name in used]):
        raise ConfigError(f"{option(idle[0])} is for a split of the data, and --score takes your own items: leave one out")
