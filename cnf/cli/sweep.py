"""cnf sweep: a grid of settings, trained one after another in this process, into one table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnf._utils.errors import CNFError, ConfigError, DataError
from cnf._utils.output import emit
from cnf.cli.changes import check, refuse_changes
from cnf.cli.options import parse, renamed
from cnf.cli.spelling import option
from cnf.config import RunConfig
from cnf.config.former import present
from cnf.config.results import read_json, read_result

__all__ = ["sweep"]

OWN = ("--evaluate", "--score", "--resume", "--out", "--dry-run", "--list")  # options of cnf train that a sweep has no use for
INTERRUPTED = (130, 143)
RESULTS = ("metric", "value", "unit", "standard_error", "accuracy", "validation", "best_step", "steps", "seconds", "parameters", "nfe")


def sweep(words: Sequence[str]) -> int:
    """Run cnf sweep and return the exit code: 1 if a run failed, after all others were trained.

    Every combination is a run folder in ``--out``, next to sweep.csv. Called again, it continues: a finished run is not
    repeated, one that was stopped is resumed.

    Raises:
        ConfigError: for a grid that cannot be, or options that a sweep has no use for.
    """
    grid, rest, folder = _split(renamed(words))
    _parse_first(grid, rest)
    runs = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    rows: list[dict[str, Any]] = []
    for number, chosen in enumerate(runs, 1):
        out = folder / _name(chosen)
        emit("message", f"run {number} of {len(runs)}: {', '.join(f'{k}={v}' for k, v in chosen.items())}", settings=chosen)
        code = _train(chosen, rest, out)
        if code in INTERRUPTED:
            emit("message", f"the sweep stops here; the same command continues it in {folder}")
            return code
        rows.append(_row(chosen, out, code))
        _write(folder / "sweep.csv", rows)
    from cnf.cli.tables import render

    table = render([{k: _text(v) for k, v in row.items() if k not in ("unit", "error")} for row in rows], "text")
    emit("result", table, runs=rows)
    emit("message", f"written to {folder / 'sweep.csv'}")
    failed = sum(row["status"] != "finished" for row in rows)
    if failed:
        emit("warning", f"{failed} of {len(rows)} runs failed; the same command tries them again")
    return int(failed > 0)


def _split(words: list[str]) -> tuple[dict[str, list[str]], list[str], Path]:
    """Return the grid (option name -> values), the options for all runs, and the folder."""
    grid: dict[str, list[str]] = {}
    rest: list[str] = []
    out: str | None = None
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(("--out=", "--sweep=")) else [word])]
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        if word == "--sweep":
            while at < len(words) and not words[at].startswith("--"):
                name, equals, values = words[at].partition("=")
                name = option(present(name))[2:]
                if not equals or not name or not all(values.split(",")):
                    raise ConfigError(f"--sweep {words[at]}: expected NAME=VALUE,VALUE,..., such as lr=1e-3,3e-4")
                if name in grid:
                    raise ConfigError(f"--sweep names {name} twice: give all its values at once")
                if len(set(values.split(","))) < len(values.split(",")):
                    raise ConfigError(f"--sweep {words[at]} has a value twice")
                grid[name], at = values.split(","), at + 1
        elif word == "--out":
            if at == len(words):
                raise ConfigError("--out: expected a folder")
            out, at = words[at], at + 1
        elif word.partition("=")[0] in OWN:
            raise ConfigError(f"{word} is not for a sweep, which trains new runs; called again, it continues by itself")
        else:
            rest.append(word)
    if not grid:
        raise ConfigError("cnf sweep needs --sweep NAME=VALUE,VALUE ..., such as --sweep lr=1e-3,3e-4 seed=0,1,2")
    for name in grid:
        if any(word.partition("=")[0] == f"--{name}" for word in rest):
            raise ConfigError(f"--{name} is both in the grid and an option of all runs: give it once")
    default = rest[0] if rest and not rest[0].startswith("-") else "default"
    return grid, rest, Path(out) if out else Path("runs") / f"sweep-{default}"


def _words(chosen: dict[str, str], rest: list[str], out: Path) -> list[str]:
    # values of several numbers are separated by spaces within quotes: hidden="64 64","32 32"
    return [*rest, *(part for name, value in chosen.items() for part in (f"--{name}", *value.split())), "--out", str(out)]


def _parse_first(grid: dict[str, list[str]], rest: list[str]) -> None:
    """Check every value of the grid before the first run trains.

    Raises:
        SystemExit: from the parser.
        ConfigError: for invalid values.
    """
    for name, values in grid.items():
        for value in values:
            check(parse(_words({name: value}, rest, Path("new")), program="cnf sweep")[0].config)


def _name(chosen: dict[str, str]) -> str:
    return ",".join(f"{name}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', value)}" for name, value in chosen.items())


def _train(chosen: dict[str, str], rest: list[str], out: Path) -> int:
    """Train, resume or skip one run, and return its exit code."""
    from cnf.cli.program import train_main

    words = _words(chosen, rest, out)
    if (out / "config.json").is_file():
        words.append("--resume")
        try:
            command, _, old = parse(words, program="cnf sweep")
            assert old is not None
            refuse_changes(old.config, command.config, command)
            if _finished(out, command.config):
                emit("message", f"{out} has finished already")
                return 0
        except CNFError as error:
            emit("warning", f"{out}: {error}")
            return 1
    return train_main(words)


def _finished(out: Path, config: RunConfig) -> bool:
    result = read_json(out / "result.json")
    return "metric" in result and (result.get("steps") == config.train.steps or result.get("stopped") == "patience")


def _row(chosen: dict[str, str], out: Path, code: int) -> dict[str, Any]:
    try:
        result = read_result(out / "result.json") if code == 0 else {}
    except DataError:
        code, result = 1, {}
    status = "finished" if code == 0 else f"failed ({code})"
    return {**chosen, "status": status, **{name: result.get(name) for name in RESULTS}, "folder": str(out)}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    from cnf.cli.tables import render
    from cnf.runs import write_atomic, write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    text = render([{k: "" if v is None else str(v) for k, v in row.items()} for row in rows], "csv")
    write_atomic(path, lambda p: write_text(p, text))
