"""cnf compare: one table of several runs, and one picture of their curves."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnf._utils.errors import ConfigError
from cnf._utils.output import emit
from cnf.cli.help import OUTPUT
from cnf.cli.tables import FORMATS, format_of, render
from cnf.config.results import COMPARABLE, read_metrics, read_result

__all__ = ["compare", "row_of"]

SHOWN = ("name", "data", "steps", "seed", "data_root", "device", "threads", "minutes", "max_time")  # in the table, or without effect on the model

EXAMPLES = """examples:
  cnf compare runs/digits-0 runs/fm-digits-0               # a table on the screen
  cnf compare runs/digits-* --out table.tex                # also as LaTeX, and the curves in table.png
  cnf compare runs/digits-0/evaluation-1.json runs/digits-0 # an evaluation next to the run's own test
  cnf compare runs/mine runs/digits-0                      # a folder of cnf.fit(..., test=rows, folder="runs/mine") too; without
                                                           # test rows its figure is that of the validation, and the table says so"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cnf compare", description="Tabulate the results of runs and draw their validation curves.\n\n" + EXAMPLES, epilog=OUTPUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="run folder of cnf train or cnf.fit, or a result.json or evaluation-N.json itself")
    add("--out", metavar="FILE", type=Path, help="also write the table: .csv, .md, .tex or .txt by its ending, and the curves next to it")
    add("--format", choices=FORMATS, help="of the table on the screen, or of --out if its ending does not say it")
    add("--plot", metavar="FILE.png", type=Path, help="where to draw the curves (default: next to --out; none without it)")
    return parser


def compare(words: Sequence[str]) -> int:
    """Run cnf compare and return the exit code.

    Raises:
        DataError: for a run without a readable result.
        ConfigError: for a file name with an unknown ending, or a file that cannot be written.
    """
    options = _parser().parse_args(["--help" if word == "--help-all" else word for word in words])
    paths = [path / "result.json" if path.is_dir() else path for path in options.runs]
    results = [read_result(path) for path in paths]
    names = _names(options.runs)
    rows = [{"run": name, **row_of(result)} for name, result in zip(names, results, strict=True)]
    filled = [name for name in rows[0] if any(row[name] for row in rows) and (name != "split" or any(row[name] != "test" for row in rows))]
    rows = [{name: row[name] for name in filled} for row in rows]
    out: Path | None = options.out
    form = options.format or "text"
    if out is not None:
        written = options.format or format_of(out.suffix)
        form = "text"
    lines = [render(rows, form)]
    for name in COMPARABLE:
        values = [str(result.get(name)) for result in results]
        if len(set(values)) > 1:
            lines.append(f"not comparable as they stand: {name} is {', '.join(dict.fromkeys(values))}")
    lines += _differing([_leaves(result.get("config", {})) for result in results])
    emit("result", "\n".join(lines), runs=dict(zip(names, results, strict=True)))
    if out is not None:
        _write(out, render(rows, written) + "\n")
        emit("message", f"written to {out}")
    plot = options.plot or (out.with_suffix(".png") if out is not None else None)
    if plot is not None:
        _draw(plot, names, paths, results)
    return 0


def row_of(result: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a result in a table of runs; "" where it has no such entry."""
    error, accuracy, config = result.get("standard_error"), result.get("accuracy"), result.get("config", {})
    return {
        "preset": str(config.get("name", "")),
        "data": str(result.get("data", "")),
        "metric": result["unit"] if result["unit"] == "bits/dim" else result["metric"].replace("_", " ").replace("elbo", "ELBO"),
        "value": _number(result["value"], "{:.4f}"),
        "±": _number(error, "{:.2g}"),
        "accuracy": _number(None if accuracy is None else 100 * accuracy, "{:.2f} %"),
        "split": str(result.get("split", "")),
        "rows": _number(result.get("items"), "{:,}"),
        "validation": _number(result.get("validation"), "{:.4f}"),
        "parameters": _number(result.get("parameters"), "{:,}"),
        "NFE": _number(result.get("nfe"), "{:.0f}"),
        "steps": _number(result.get("steps"), "{:,}"),
        "seconds": _number(sum(result.get(key) or 0 for key in ("seconds", "search_seconds")) or None, "{:.0f}"),
        "seed": _number(result.get("seed"), "{}"),
    }


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a nested configuration by the names that --help-all has for them."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {(name if key == "kind" else key): leaf for key, leaf in _leaves(value).items()}
        else:
            found[name] = value
    return found


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line with the settings in which runs of one preset differ, apart from those in the table; "-" where a run has none."""
    names = dict.fromkeys(name for each in settings for name in each if name not in SHOWN)
    values = {name: [str(each.get(name, "-")) for each in settings] for name in names}
    if len({each.get("name") for each in settings}) > 1:  # presets differ in most settings, and the table names them
        return []
    texts = [f"{name} {', '.join(own)}" for name, own in values.items() if len(set(own)) > 1]
    return [f"the runs also differ in: {'; '.join(texts)}"] if texts else []


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def _names(runs: Sequence[Path]) -> list[str]:
    """Return short names: the last parts of the paths, as many as tell them apart."""
    paths = [Path(os.path.normpath(run)).parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _write(path: Path, text: str) -> None:
    from cnf.runs import write_atomic, write_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: its folder cannot be made: {error}") from None
    write_atomic(path, lambda p: write_text(p, text.rstrip("\n")))


def _draw(path: Path, names: list[str], results: list[Path], found: list[dict[str, Any]]) -> None:
    if path.suffix != ".png":
        raise ConfigError(f"--plot {path}: expected a file ending in .png")
    curves = {}
    for name, file in zip(names, results, strict=True):
        rows = [(r["step"], r["validation"]) for r in read_metrics(file.parent / "metrics.jsonl") if isinstance(r.get("validation"), float)]
        if rows:
            curves[name] = rows
    if not curves:
        emit("message", "no curves: no run has a metrics.jsonl with validations")
        return
    from cnf import plotting

    path.parent.mkdir(parents=True, exist_ok=True)
    units = dict.fromkeys(result["unit"] for result in found)
    plotting.validation_curves(curves, path, unit=", ".join(units))
    emit("message", f"curves in {path}")
