"""kill -9 at any moment: what is resumed ends with the same bits as a run that was never disturbed.

Children are forked by a server that has imported torch, so that a hundred of them take minutes.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which the first optimiser imports, in seconds
from tqdm import tqdm
from trainers import checkpointer, policy, training

from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.errors import SolverError
from cnf.losses import Likelihood
from cnf.runs import LOCK, RunInfo, files, leftovers, write_config
from cnf.training import Trainer

HERE = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context("forkserver")
POINTS = torch.randn(120, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([0.3, 1.0]) + torch.tensor([2.0, 0.0])
DATA = DataSplits("points", "table", POINTS[:80], POINTS[80:100], POINTS[100:])
TRAIN = TrainConfig.of(steps=60, batch_size=16, accumulate=2, warmup=3, lr=0.05, ema_decay=0.9, kinetic=0.01, validate_every=4, patience=6, solver_check_every=5, solver_check_tolerance=1e-9, max_grid_steps=8)  # fmt: skip
SOLVER = SolverConfig.of(grid_steps=2, divergence="hutchinson", eval_rtol=1e-3, eval_atol=1e-3)
CONFIG = RunConfig("points", DataConfig(), FlowConfig.of(hidden=(8,), zero_init=False), SOLVER, TRAIN)
INFO = RunInfo(CONFIG, (2,), None, 0, (), ("column 0", "column 1"))
FAILING = {9, 10, 11, 15, 20, 21, 22}  # batches without a solution: twice three in a row, after which weights go back

# where a child is killed: file, place, and the how-manieth time it comes there; or a moment within a step, and the step
WRITES = [
    ("trainer.pt", place, count) for count in (1, 9) for place in ("before", "during", "written", "synced", "renamed", "done")
] + [("model.safetensors", place, 2) for place in ("before", "during", "synced", "renamed")]
MOMENTS = [("evaluate", 7), ("backward", 13), ("optimizer", 14), ("average", 23)]
FEW = [
    ("trainer.pt", "during", 1), ("model.safetensors", "renamed", 2), ("trainer.pt", "renamed", 9), ("optimizer", 18),
]  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Calls ``die`` at the ``count``-th time that ``name`` is at ``place``."""

    def __init__(self, name, place, count):
        self.name, self.place, self.left = name, place, count

    def __call__(self, place, path):
        half = self.place == "during" and place == "written"
        if (place == self.place or half) and self.name in path.name:
            self.left -= 1
            if self.left == 0:
                if half:  # what the disk has of a write that is under way
                    os.truncate(path, path.stat().st_size // 2)
                die()


def train(folder, fault, started):
    """What a child does: begin or resume, and be killed where ``fault`` says."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, which a kill leaves behind
    evaluate, update = Likelihood.evaluate, Trainer.update
    if fault is not None and len(fault) == 3:
        files.hook = Killer(*fault)
    moment, at = fault if fault is not None and len(fault) == 2 else ("", -1)

    def failing(self, x, context, noise):
        found = evaluate(self, x, context, noise)
        if noise.step in FAILING:
            raise SolverError("the state is not finite")
        if moment == "evaluate" and noise.step == at:
            die()
        return found

    def watched(self):
        if self.state.step == at and moment == "backward":
            self.model.blocks[0].field.register_full_backward_hook(lambda *_: die())
            next(self.model.parameters()).register_hook(lambda _: die())
        if self.state.step == at and moment == "optimizer":  # between two of its tensors
            self.state.optimizer.register_step_pre_hook(lambda *_: die())
        if self.state.step == at and moment == "average":
            self.state.optimizer.register_step_post_hook(lambda *_: die())
        values = update(self)
        started.touch()
        return values

    Likelihood.evaluate, Trainer.update = failing, watched
    resume = (folder / "config.json").exists()
    if not resume:
        folder.mkdir(exist_ok=True)
        write_config(folder, INFO)
    run = training(INFO, DATA, folder, resume=resume, quiet=True)
    run.log_every, checkpointer(run).save_seconds, policy(run).max_skips = 1, 0.0, 3  # a checkpoint after every step
    run.run()


class Lab:
    """Runs in their folders, and what became of them."""

    def __init__(self, root):
        self.root, self.injected, self.lost, self.begun = Path(root), 0, [], time.monotonic()
        self.seconds = 0.0
        CONTEXT.set_forkserver_preload(["test_crash"])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*map(str, (HERE, HERE.parent)), before)))  # where the server imports from
        try:
            forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        self.started = self.root / "started"

    def child(self, folder, fault=None, delay=None):
        """One child's exit code; it is killed ``delay`` seconds after its first step if that is given."""
        self.started.unlink(missing_ok=True)
        process = CONTEXT.Process(target=train, args=(folder, fault, self.started))
        process.start()
        while process.is_alive() and not self.started.exists():
            time.sleep(0.001)
        begun = time.monotonic()
        if delay is not None:
            time.sleep(delay)
            process.kill()
        process.join(120)
        self.seconds = self.seconds or time.monotonic() - begun  # of the first child, which nothing disturbs
        assert process.exitcode is not None, "a child hangs"
        if process.exitcode == -signal.SIGKILL:
            self.injected += 1
        return process.exitcode

    def reference(self):
        assert self.child(self.root / "whole") == 0
        self.whole = everything(self.root / "whole")
        return self.whole

    def compare(self, folder, what):
        """Resume to the end; anything but the undisturbed run's bits is a loss."""
        code = self.child(folder)
        if code != 0 or (wrong := differences(self.whole, everything(folder))):
            self.lost.append((what, code if code else wrong))
        elif leftovers(folder) or (folder / LOCK).exists():
            self.lost.append((what, "something is left over"))


def everything(folder):
    """All that a run has come to, but for its seconds."""
    from safetensors.torch import load_file

    state = torch.load(folder / "trainer.pt", weights_only=True)
    del state["numbers"]["seconds"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state["rows"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    state["export"] = load_file(str(folder / "model.safetensors"))
    return state


def differences(one, other, where=""):
    """The names of what is not the same to the last bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [where]
        return [d for k in one for d in differences(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}/{i}")]
    return [] if one == other or (one != one and other != other) else [where]


def check_reference(whole):
    """The undisturbed run has been through everything that is to survive."""
    assert whole["numbers"]["skipped"] == len(FAILING) and whole["callbacks"]["NonFinitePolicy"]["rollbacks"] == 2
    assert whole["callbacks"]["SolverMonitor"]["refinements"] == 2
    assert whole["numbers"]["step"] == len(whole["rows"]) < TRAIN.steps and whole["numbers"]["worse"] == TRAIN.patience
    assert math.isfinite(whole["numbers"]["best"])


def named(lab, chains):
    """Runs that are killed at one named place after another."""
    for number, chain in enumerate(chains):
        folder = lab.root / f"named-{number}"
        for fault in chain:
            code = lab.child(folder, fault)
            assert code == -signal.SIGKILL, f"{fault}: exit code {code}"
        lab.compare(folder, chain)


def at_random(lab, kills, chain):
    """Runs that are killed at random times, each up to ``chain`` times."""
    draw, wanted, number = random.Random(0), lab.injected + kills, 0
    while lab.injected < wanted:
        folder, number = lab.root / f"random-{number}", number + 1
        delays = []
        for _ in range(min(chain, wanted - lab.injected)):
            delays.append(round(draw.uniform(0, 0.5 * lab.seconds), 4))
            if lab.child(folder, delay=delays[-1]) == 0:  # it was faster
                break
        lab.compare(folder, delays)


def report(lab):
    lost = len(lab.lost)
    print(f"\nfaults injected: {lab.injected}, survived: {lab.injected - lost}, lost: {lost}, in {time.monotonic() - lab.begun:.0f} s")
    assert not lab.lost


@pytest.mark.slow
def test_a_few_kills(tmp_path):
    lab = Lab(tmp_path)
    check_reference(lab.reference())
    named(lab, [FEW])
    at_random(lab, kills=1, chain=1)
    report(lab)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    lab = Lab(tmp_path)
    check_reference(lab.reference())
    named(lab, [[fault] for fault in WRITES + MOMENTS])
    at_random(lab, kills=80, chain=4)
    assert lab.injected == 100
    report(lab)
