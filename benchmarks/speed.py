"""Training steps of the published image models: the published codes' computation against ours, in each of our modes.

    python benchmarks/speed.py --quick                # rnode-mnist at batch 32; at most 8 minutes on two cores
    python benchmarks/speed.py --full --json benchmarks/results.json
    python benchmarks/speed.py --cases ffjord-mnist --batch 16 --modes fused compiled --profile

Both sides have the same weights and take a whole step: gradients cleared, forward and backward pass, Adam. They are timed in
turn in one process, compilation outside the timing. Before that each gives the gradient of the log-likelihood once with
the same noise, which shows how far the continuous adjoint is from the grid's own gradient, and log p, which is held
against a fine grid. ``--full`` adds steps chosen while training (automatic_steps.py), cost tables (costs.py) and the time to a validation loss
(time_to_loss.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from automatic_steps import AUTOMATIC_COLUMNS, automatic_steps
from costs import COST_COLUMNS, ORDER_COLUMNS, costs, gradient_orders
from image_pair import CASES, COLUMNS, compare
from measure import machine, markdown, record, versions
from modes import MODES, images
from time_to_loss import LOSS_COLUMNS, time_to_loss

PARTS = ("orders", "steps", "automatic", "costs", "loss")
QUICK = ("plain", "fused", "compiled", "bf16", "bf16 compiled")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="rnode-mnist at batch 32, few turns (the default)")
    extent.add_argument(
        "--full", action="store_true", help="both cases, all batches, automatic steps, cost tables, time to a loss"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, help="published models")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="ways of ours")
    parser.add_argument("--batch", type=int, nargs="+", help="images a step")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads; all cores if not given"
    )
    parser.add_argument("--turns", type=int, help="timings of each")
    parser.add_argument("--steps", type=int, help="steps of rk4 on both sides, in place of the case's")
    parser.add_argument(
        "--gradient", choices=("direct", "checkpoint", "reversible"), help="by free memory if not given"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data-root", help="folder that has MNIST; enlarged digits if not given")
    parser.add_argument(
        "--weights", type=Path, help="folder of a trained run of the case; bent initial weights if not given"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure")
    parser.add_argument(
        "--target", type=float, default=2.0, help="validation bits/dim of the digits, for the part loss"
    )
    parser.add_argument("--updates", type=int, default=200, help="of each training, for the part automatic")
    parser.add_argument("--profile", action="store_true", help="print where one step of each mode spends its time")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    full = args.full
    parts = args.parts or (PARTS if full else PARTS[:2])
    modes = [MODES[name] for name in args.modes or (MODES if full else QUICK)]
    about = {**machine(), "threads": args.threads, **versions("torch", "torchdiffeq")}
    if args.device != "cpu":
        about["device"] = torch.cuda.get_device_name(args.device)
        torch.backends.cudnn.allow_tf32 = False  # on both sides: fp32 is what training means by it
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    tables: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {}

    def show(name: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
        tables[name] = rows, columns
        print(f"\n{markdown(rows, columns)}", flush=True)
        if args.json:  # at once: what comes later may be killed
            record(args.json, name, argv, rows, about)

    if "orders" in parts:
        show("speed orders", gradient_orders(), ORDER_COLUMNS)
    if "steps" in parts:
        rows: list[dict[str, Any]] = []
        for case in args.cases or (CASES if full else ["rnode-mnist"]):
            usual = [16, 32, 64, 200] if case == "rnode-mnist" else [16, 64, 200]
            for batch in args.batch or (usual if full else [32]):
                x = images(batch, args.data_root).to(args.device)
                # quick: the whole is to end within 8 minutes, floors and the table included
                deadline = float("inf") if full or args.turns else began + 420
                turns = args.turns or (5 if full else 7)
                rows += compare(
                    case, batch, modes, x, turns, steps=args.steps, deadline=deadline, gradient=args.gradient,
                    profile=args.profile, weights=args.weights,
                )  # fmt: skip
        show("speed", rows, COLUMNS)
    if "automatic" in parts:
        rows = []
        for mode in [m for m in modes if m.compiled] or [MODES["fused"]]:
            rows += automatic_steps(
                mode, args.updates, data_root=args.data_root, device=args.device, threads=args.threads
            )
        show("speed automatic", rows, AUTOMATIC_COLUMNS)
    if "costs" in parts:
        show("speed costs", costs(modes, full), COST_COLUMNS)
    if "loss" in parts:
        show("speed loss", time_to_loss(args.target), LOSS_COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
