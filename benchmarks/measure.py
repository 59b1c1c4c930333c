"""Shared by the benchmarks: what machine this is, alternating timings, tables, and the file of measured rows."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "alternate", "machine", "markdown", "record", "versions"]

RESULTS = Path(__file__).resolve().parent / "results.json"
Row = dict[str, Any]


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package; None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> Row:
    """What the figures were measured on, and how busy it was: a load well above 1 disturbs wall times."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    load = round(os.getloadavg()[0], 2)
    return {"cpu": model, "cores": os.cpu_count(), "load": load, "date": date.today().isoformat()}


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each function, called in turn so that drift and neighbours hit all alike.

    CPU seconds count this process only, all its threads: on a busy machine they are the steadier figure.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    walls: dict[str, list[float]] = {name: [] for name in functions}
    cpus: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if turn >= warmup:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    return {
        n: {"wall": statistics.median(walls[n]), "cpu": statistics.median(cpus[n]), "fastest": min(walls[n])}
        for n in functions
    }


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table of ``rows``; ``columns`` maps a heading to a format string that takes a row's entries by name."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(form.format_map(row) for form in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def record(path: Path, name: str, arguments: Sequence[str] | None, rows: Sequence[Row], about: Row) -> None:
    """Put the rows under ``name`` into the JSON file, leaving what other benchmarks wrote.

    ``arguments`` are the command line's, sys.argv's if None.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", f"benchmarks/{name.split()[0]}.py", *words])
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    everything[name] = {"command": command, **about, "rows": list(rows)}
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
