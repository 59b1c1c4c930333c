"""The program cnf and its aliases; parsing, help and lists import no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from cnf._utils.errors import ConfigError
from cnf._utils.output import output, take_output
from cnf._utils.version import __version__
from cnf.cli.custom_field import take_field
from cnf.cli.exits import guard
from cnf.cli.help import COMMANDS, overview, short_help
from cnf.cli.listing import list_presets, list_published
from cnf.config import PRESETS

__all__ = ["classify_main", "main", "sample_main", "train_main"]

SAMPLE_ROOM = "fewer samples (-n), --device cpu, or a machine with more memory"
EVALUATION_ROOM = "--device cpu, or a machine with more memory"
TRAINING_ROOM = "--accumulate 4 (with --resume too), or in a new run a smaller --batch-size or --gradient checkpoint"
EVALUATION_ONLY = {"--evaluate": "cnf evaluate RUN", "--score": "cnf rank RUN PATH...", "--list": "cnf list"}

Words = list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program cnf and return the exit code."""
    words, options = take_output(sys.argv[1:] if arguments is None else arguments)
    with output(**options):
        return guard(lambda: _main(words), room=_room(words, f"cnf {words[0] if words else ''}"))


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run train_density.py and return the exit code."""
    return _script(arguments, "train_density.py", lambda words: _train(words, "train_density.py"))


def classify_main(arguments: Sequence[str] | None = None) -> int:
    """Run train_classifier.py (train_density.py with predictive default presets) and return the exit code."""
    return _script(arguments, "train_classifier.py", lambda words: _train(words, "train_classifier.py"))


def sample_main(arguments: Sequence[str] | None = None) -> int:
    """Run sample.py and return the exit code."""
    return _script(arguments, "sample.py", lambda words: _sample(words, "sample.py"))


def _script(arguments: Sequence[str] | None, program: str, run: Callable[[Words], int]) -> int:
    words, options = take_output(sys.argv[1:] if arguments is None else arguments)
    with output(**options):
        return guard(lambda: _version(program) if words == ["--version"] else run(words), room=_room(words, program))


def _room(words: Words, program: str) -> str:
    """Return the advice for a run that does not fit into memory."""
    if "sample" in program:
        return SAMPLE_ROOM
    if program in ("cnf evaluate", "cnf rank"):
        return EVALUATION_ROOM
    return EVALUATION_ROOM if any(word.partition("=")[0] == "--evaluate" for word in words) else TRAINING_ROOM


def _main(words: Words) -> int:
    if not words or words[0] in ("-h", "--help", "--help-all", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        return _version("cnf")
    name, *rest = words
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        hint = f"did you mean cnf train {name}?" if name in PRESETS else hint
        raise ConfigError(f"cnf {name}: there is no such command; {hint}")
    if "--version" in rest:
        return _version("cnf")
    return _RUN[name](rest)


def _version(program: str) -> int:
    print(f"{program} {__version__}")
    return 0


def _train(words: Words, program: str = "cnf train") -> int:
    from cnf.cli.options import CLASSIFIER, DEFAULT, parse, renamed

    words = take_field(words)
    fallback = CLASSIFIER if program == "train_classifier.py" else DEFAULT
    if not program.startswith("cnf ") and "--list" in words:
        return list_presets()
    if program == "cnf train":
        for word in words:
            if (better := EVALUATION_ONLY.get(word.partition("=")[0])) is not None:
                raise ConfigError(f"{word} is not an option of cnf train: use {better}")
    if _wants_help(words):
        print(short_help(program, words))
        return 0
    words = renamed(["--help" if word == "--help-all" else word for word in words])
    parsed = parse(words, fallback, program, settled=False)
    _quiet_threads()
    from cnf.cli.train import train

    return train(words, fallback, program, parsed)


def _evaluate(words: Words) -> int:
    if _wants_help(words) or "--help-all" in words or not words:
        print(short_help("cnf evaluate", words))
        return 0
    return _train(["--evaluate", *words], "cnf evaluate")


def _rank(words: Words) -> int:
    if _wants_help(words) or "--help-all" in words or not words:
        print(short_help("cnf rank", words))
        return 0
    plain = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if plain < 2:
        raise ConfigError("cnf rank RUN PATH...: expected a run folder, then files or folders of the items to rank, before all options")
    return _train(["--evaluate", words[0], "--score", *words[1:]], "cnf rank")


def _sample(words: Words, program: str = "cnf sample") -> int:
    from cnf.cli.sample_options import check, parser

    words = take_field(words)
    options = parser(program).parse_args(["--help" if word == "--help-all" else word for word in words])
    check(options)
    _quiet_threads()
    from cnf.cli.sample import sample

    return sample(options)


def _compare(words: Words) -> int:
    from cnf.cli.compare import compare

    return compare(words)


def _sweep(words: Words) -> int:
    if _wants_help(words) or "--help-all" in words or not words:
        print(short_help("cnf sweep", words))
        return 0
    from cnf.cli.sweep import sweep

    return sweep(words)


def _list(words: Words) -> int:
    if _wants_help(words) or "--help-all" in words:
        print(short_help("cnf list", words))
        return 0
    if unknown := [word for word in words if word != "--published"]:
        raise ConfigError(f"cnf list {unknown[0]}: expected nothing, or --published")
    return list_published() if words else list_presets()


_RUN: dict[str, Callable[[Words], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "rank": _rank,
    "sample": _sample,
    "compare": _compare,
    "sweep": _sweep,
    "list": _list,
}


def _wants_help(words: Words) -> bool:
    return "-h" in words or "--help" in words


def _quiet_threads() -> None:
    """Let idle threads sleep; before torch is imported: busy waiting makes steps many times slower on a busy machine."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
