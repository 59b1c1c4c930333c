"""Where one training step spends its time: torch.profiler's operators, by their own CPU time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import markdown

__all__ = ["step_profile"]

# first match counts; what torch.compile has fused cannot be told apart
GROUPS = {
    "convolutions": ("conv",),
    "matrix products": ("addmm", "aten::mm", "bmm", "baddbmm", "linear", "gemm", "matmul"),
    "fused by torch.compile": ("fused", "compiled", "inductor", "graph_"),
    "activations": ("softplus", "sigmoid", "tanh", "silu", "elu", "relu", "exp", "log"),
}


def group(name: str) -> str:
    """The group of an operator."""
    low = name.lower()
    return next((g for g, words in GROUPS.items() if any(word in low for word in words)), "rest")


def step_profile(step: Callable[[], object], top: int = 12) -> str:
    """Tables of the groups and of the ``top`` operators of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        step()
    averages = sorted(run.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in averages) or 1.0
    sums: dict[str, float] = {}
    for e in averages:
        sums[group(e.key)] = sums.get(group(e.key), 0.0) + e.self_cpu_time_total
    groups = [
        {"name": name, "share": t / total, "seconds": t / 1e6} for name, t in sorted(sums.items(), key=lambda p: -p[1])
    ]
    rows = [
        {"name": e.key, "group": group(e.key), "share": e.self_cpu_time_total / total, "seconds": e.self_cpu_time_total / 1e6, "calls": e.count}
        for e in averages[:top]
    ]  # fmt: skip
    share = {"share": "{share:.1%}", "own CPU s": "{seconds:.3f}"}
    return "\n\n".join(
        [
            markdown(groups, {"group": "{name}", **share}),
            markdown(rows, {"operator": "{name}", "group": "{group}", **share, "calls": "{calls}"}),
        ]
    )
