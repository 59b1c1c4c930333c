"""Shared by the benchmarks: what machine this is, alternating timings, tables, and the file of measured rows."""

from __future__ import annotations

import argparse
import json
import math
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

import torch
from torch import Tensor, nn

__all__ = ["RESULTS", "alternate", "draw_figure", "machine", "markdown", "record", "seconds", "spread", "training_step", "versions"]

RESULTS = Path(__file__).resolve().parent / "results.json"
# of the processor, which decide what bfloat16 is worth
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
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
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        entries = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in reversed(entries)}
        model = known.get("model name", model)
        have = set(known.get("flags", "").split())
        flags = ", ".join(f"{flag} {'yes' if flag in have else 'no'}" for flag in FLAGS)
    load = round(os.getloadavg()[0], 2)
    return {"cpu": model, "cores": os.cpu_count(), "flags": flags, "load": load, "date": date.today().isoformat()}


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, deadline: float = math.inf
) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each function, called in turn so that drift and neighbours hit all alike.

    CPU seconds count this process only, all its threads: on a busy machine they are the steadier figure.

    Args:
        functions: by name.
        repeats: turns that count.
        warmup: turns before them that do not.
        deadline: a ``time.perf_counter()`` that no turn but the first counted one is expected to pass.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    walls: dict[str, list[float]] = {name: [] for name in functions}
    cpus: dict[str, list[float]] = {name: [] for name in functions}
    took = 0.0
    for turn in range(warmup + repeats):
        began = time.perf_counter()
        if turn > warmup and began + took > deadline:
            break
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if turn >= warmup:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
        took = time.perf_counter() - began
    return {
        n: {
            "wall": statistics.median(walls[n]),
            "cpu": statistics.median(cpus[n]),
            "fastest": min(walls[n]),
            "repeats": len(walls[n]),
        }
        for n in functions
    }


def seconds(function: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median wall seconds of one function."""
    return alternate({"it": function}, repeats, warmup)["it"]["wall"]


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A whole training step: gradients cleared, forward and backward pass, Adam.

    The rate is zero: Adam does its work, but the weights, and so the cost of a step, stay put. On a GPU the step ends when
    the device has done it.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    cuda = any(p.is_cuda for p in model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    return step


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table of ``rows``; ``columns`` maps a heading to a format string that takes a row's entries by name."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(form.format_map(row) for form in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over seeds; the mean alone for one seed."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def record(path: Path, name: str, arguments: Sequence[str] | None, rows: Sequence[Row], about: Row) -> None:
    """Put the rows under ``name`` into the JSON file, leaving what other benchmarks wrote.

    ``arguments`` are the command line's, sys.argv's if None. What is not a number becomes null, which JSON has.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", f"benchmarks/{name.split()[0]}.py", *words])
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    everything[name] = {"command": command, **about, "rows": kept}
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def draw_figure(
    about: str, arguments: Sequence[str] | None, name: str, length: str, figures: Mapping[str, tuple[Callable[..., Any], int, int]],
    rows: Callable[[Any], Sequence[Row]], table: Callable[[Any], str],
) -> None:  # fmt: skip
    """Parse the command line of a benchmark with one command for each figure, run one, record its rows and print its table.

    Args:
        about: the help.
        arguments: the command line's words, sys.argv's if None.
        name: of the benchmark.
        length: of a run: the name of an option, ``"epochs"`` or ``"steps"``.
        figures: by name: a function of (seeds, length, folder of pictures, whether quick), and the defaults of the first two.
        rows: rows to record, from what the function returns.
        table: text to print, from the same.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(figures))
    for k, option in enumerate(("seeds", length), 1):
        defaults = ", ".join(f"{key} {entry[k]}" for key, entry in figures.items())
        parser.add_argument(f"--{option}", type=int, help=f"(default: {defaults})")
    parser.add_argument("--quick", action="store_true", help="one seed and few points, in seconds")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.pictures.mkdir(parents=True, exist_ok=True)
    function, seeds, default = figures[options.figure]
    many = getattr(options, length)
    if options.quick:
        seeds, default = 1, 2 if length == "epochs" else 20
    found = function(options.seeds or seeds, many or default, options.pictures, options.quick)
    record(options.out, f"{name} {options.figure}", arguments, rows(found), {**machine(), "versions": versions("torch", "torchdiffeq")})
    print(table(found))
