"""Training steps a second with one process and with several, one thread each; and what an all-reduce costs by arithmetic.

Steps are a run's own (`Trainer.update`: batch, forward, backward, all-reduce, clip, Adam, averaging), of the digits preset.
"strong" shares one batch of the preset's size, "weak" gives each process such a batch. Efficiency is that of the machine:
samples a second, divided by those of one process and by the number of processes.

    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --expected
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import machine, markdown, record, versions

from cnf.cli.common import load_splits
from cnf.config import PUBLISHED, preset
from cnf.distributed import join
from cnf.models import build
from cnf.runs import RunInfo
from cnf.training import from_settings

COLUMNS = {
    "scaling": "{mode}",
    "processes": "{processes}",
    "joint batch": "{batch}",
    "s a step": "{step:.4f}",
    "samples/s": "{rate:,.0f}",
    "efficiency": "{efficiency:.0%}",
    "by CPU time": "{cpu_efficiency:.0%}",
    "all-reduce ms": "{reduce_ms:.2f}",
}
EXPECTED = {
    "model": "{model}",
    "parameters": "{parameters:,}",
    "MB": "{megabytes:.1f}",
    "GPUs": "{gpus}",
    "GB/s": "{bandwidth:g}",
    "all-reduce ms": "{reduce_ms:.2f}",
    "efficiency at 0.1 s a step": "{tenth:.1%}",
    "at 1 s": "{one:.1%}",
    "95 % from": "{floor_ms:.0f} ms a step",
}
MODELS = ("RNODE MNIST, two blocks", "RNODE ImageNet64, two blocks", "AFFJORD hyper CIFAR-10, CelebA 32")
# (GPUs, bytes a second that the slowest link of the ring carries for each, seconds a hop)
NETWORKS = ((8, 200e9, 5e-6), (64, 25e9, 10e-6), (64, 1.25e9, 30e-6))


def all_reduce_seconds(parameters: int, processes: int, bandwidth: float, latency: float, width: int = 4) -> float:
    """A ring: every byte travels 2 (N - 1)/N times over each link, in 2 (N - 1) hops."""
    return 2 * (processes - 1) * (parameters * width / processes / bandwidth + latency)


def expected() -> list[dict[str, Any]]:
    """Some published models, the largest among them, on three networks."""
    rows = []
    for model, parameters in [(m.name, m.parameters) for m in PUBLISHED if m.name in MODELS]:
        for gpus, bandwidth, latency in NETWORKS:
            cost = all_reduce_seconds(parameters, gpus, bandwidth, latency)
            rows.append({
                "model": model, "parameters": parameters, "megabytes": 4 * parameters / 1e6, "gpus": gpus,
                "bandwidth": bandwidth / 1e9, "reduce_ms": 1e3 * cost, "tenth": 0.1 / (0.1 + cost), "one": 1 / (1 + cost),
                "floor_ms": 1e3 * 19 * cost,
            })  # fmt: skip
    return rows


def steps(batch: int, repeats: int, device: str) -> dict[str, float]:
    """One process of the group: median seconds of a step and of its all-reduce, CPU seconds of a step."""
    config = preset("digits").config
    train = config.train.change(batch_size=batch, threads=1, device=device)
    config = dataclasses.replace(config, train=train)
    with join(device) as group, tempfile.TemporaryDirectory() as folder:
        data = load_splits(config, download=False, group=group)
        info = RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)
        trainer = from_settings(info, data, Path(folder), quiet=True, group=group)
        walls, cpus, reduces = [], [], []
        for turn in range(2 + repeats):
            group.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.update()
            trainer.read_metrics()  # reads the loss, so a GPU has finished
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            group.barrier()
            wall = time.perf_counter()
            group.all_reduce_gradients(trainer.model.parameters(), 1 / group.size, torch.zeros(4, dtype=torch.float64))
            reduces.append(time.perf_counter() - wall)
            trainer.state.step = turn + 1
    found = {"step": walls, "cpu": cpus, "reduce": reduces}
    return {name: statistics.median(values[2:]) for name, values in found.items()}


def measure(processes: int, batch: int, repeats: int, device: str) -> dict[str, float]:
    """Start the processes, as torchrun would, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    word = [sys.executable, __file__, "--child", str(batch), "--repeats", str(repeats), "--device", device]
    common = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WORLD_SIZE": str(processes)}
    running = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running.append(subprocess.Popen(word, env=common | own, stdout=subprocess.PIPE, text=True))
    out = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process failed: exit codes {[process.returncode for process in running]}")
    found = [json.loads(text.splitlines()[-1]) for text in out]
    return {name: max(one[name] for one in found) for name in found[0]}  # a step lasts until the last has done it


def table(counts: Sequence[int], batch: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """All rows; one process comes first."""
    rows: list[dict[str, Any]] = []
    alone = measure(1, batch, repeats, device)
    for mode in ("strong", "weak"):
        for processes in (1, *counts):
            joint = batch * processes if mode == "weak" else batch
            found = alone if processes == 1 else measure(processes, joint, repeats, device)
            rate, base = joint / found["step"], batch / alone["step"]
            rows.append({
                "mode": mode, "processes": processes, "batch": joint, "step": found["step"], "rate": rate,
                "efficiency": rate / base / processes, "reduce_ms": 1e3 * found["reduce"] if processes > 1 else 0.0,
                "cpu_efficiency": joint / processes / found["cpu"] / (batch / alone["cpu"]),
            })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 steps a row instead of 60")
    parser.add_argument("--expected", action="store_true", help="print the arithmetic for GPUs, and measure nothing")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="numbers of processes beside one")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="record the rows in this file")
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(steps(options.child, options.repeats, options.device)))
        return
    if options.expected:
        print(markdown(expected(), EXPECTED))
        return
    parameters = sum(p.numel() for p in build(preset("digits").config.model, preset("digits").config.solver, (1, 8, 8), levels=17).parameters())
    rows = table(options.processes, options.batch, options.repeats or (12 if options.quick else 60), options.device)
    about = {"machine": machine(), "versions": versions("torch"), "parameters": parameters}
    print(markdown(rows, COLUMNS))
    print(f"digits preset, {parameters:,} parameters; {about['machine']}")
    if options.json:
        record(options.json, "scaling", arguments, rows, about)


if __name__ == "__main__":
    main()
