"""What goes wrong in a long run: full disks, folders that vanish, two processes, divergence, memory."""

import errno
import fcntl
import math
import os
import re
import resource
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainers
from conftest import logged_rows, mostly_slow, slow
from trainers import average, monitor, policy, training

from cnf.cli import train_main
from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.errors import CheckpointError, ConfigError, SolverError, TrainingError
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.losses import Likelihood, Supervised
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.runs import (
    LOCK,
    RunInfo,
    files,
    load,
    load_trainer,
    lock,
    locked,
    read_config,
    save_trainer,
    write_config,
    write_weights,
)
from cnf.solvers import Adaptive, FixedGrid, counted
from cnf.training import Interrupted, NonFinitePolicy, Trainer
from cnf.training.memory import is_oom
from cnf.training.metrics import StepResult
from cnf.training.step import gradient, pieces
from cnf.transforms import Sequential

POINTS = torch.randn(90, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([0.3, 1.0]) + torch.tensor([2.0, 0.0])
DATA = DataSplits("points", "table", POINTS[:50], POINTS[50:70], POINTS[70:])


def settings(solver=None, **train):
    train = {"steps": 12, "batch_size": 16, "warmup": 3, "lr": 0.01, "validate_every": 4, "solver_check_every": 50, "kinetic": 0.01} | train
    model = FlowConfig.of(hidden=(8,), zero_init=False, blocks=2)
    config = RunConfig("points", DataConfig(), model, solver or SolverConfig.of(grid_steps=2), TrainConfig.of(**train))
    return RunInfo(config, (2,), None, 0, (), ("column 0", "column 1"))


def trainer(folder, *, resume=False, quiet=True, **options):
    info = settings(**options)
    if not resume:
        folder.mkdir(exist_ok=True)
        write_config(folder, info)
    return training(info, DATA, folder, resume=resume, quiet=quiet)


def same(one, other):
    """Everything that training has changed, and its record, is the same to the last bit."""
    for a, b in ((one.model, other.model), (average(one), average(other))):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    for i, state in one.state.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, other.state.optimizer.state_dict()["state"][i][k]) for k, v in state.items())
    assert logged_rows(one.folder) == logged_rows(other.folder)
    assert (policy(one).rollbacks, one.state.skipped, one.state.best) == (policy(other).rollbacks, other.state.skipped, other.state.best)


def forked(function):
    """The exit status of ``function`` in a process of its own."""
    child = os.fork()
    if not child:
        status = 1
        try:
            status = int(function() or 0)
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", files.STAGES)
@pytest.mark.parametrize("number, word", [(errno.ENOSPC, "the disk is full: free some space"), (errno.EROFS, "read-only: make it writable")])
def test_a_write_that_fails_names_the_path_and_what_to_try(tmp_path, monkeypatch, place, number, word):
    save_trainer(tmp_path, {"step": 1})

    def fail(at, path):
        if at == place:
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "hook", fail)
    with pytest.raises(CheckpointError, match=rf"trainer\.pt cannot be written: .*{word}"):
        save_trainer(tmp_path, {"step": 2})
    assert load_trainer(tmp_path)[0]["step"] == (2 if place in ("renamed", "done") else 1)
    assert {p.name for p in tmp_path.iterdir()} == {"trainer.pt", "trainer.previous.pt"}


@pytest.mark.parametrize("what", ["trainer.pt", "model.safetensors"])
def test_what_torch_and_safetensors_say_of_a_full_disk(tmp_path, what):
    """A real failure in the middle of a write: the system allows files of some bytes only."""
    flow = Flow(CNF(MLP(2, hidden=(64, 64))), (2,))

    def write():
        save_trainer(tmp_path, flow.state_dict()) if what == "trainer.pt" else write_weights(tmp_path, flow)

    write()
    before = (tmp_path / what).read_bytes()

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write()
        except CheckpointError as error:
            return 0 if f"{tmp_path / what} cannot be written: " in str(error) else 3
        return 4

    assert forked(limited) == 0
    assert (tmp_path / what).read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_the_rename_is_flushed_too(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: order.append("folder" if os.path.isdir(f"/proc/self/fd/{n}") else "file") or sync(n))
    monkeypatch.setattr(os, "replace", lambda *a: order.append("rename") or replace(*a))
    files.write_atomic(tmp_path / "file", lambda p: files.write_text(p, "x"))
    assert order == ["file", "rename", "folder"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".trainer.pt.123.tmp", ".model.safetensors.4.tmp", ".metrics.jsonl.5.tmp"):
        (tmp_path / name).write_text("half")
    kept = {".mine.txt.123.tmp", "trainer.pt.123.tmp", ".trainer.pt.tmp", ".evaluation-1.json.7.tmp"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    with locked(tmp_path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == kept


# -- a run whose folder fails ------------------------------------------------------------------------------------


def full(monkeypatch, names, until):
    """Files of ``names`` cannot be written until ``until()``."""

    def fail(place, path):
        if place == "written" and path.name.startswith(tuple(f".{n}." for n in names)) and not until():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "hook", fail)


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_is_not(tmp_path, monkeypatch, capsys):
    whole = trainer(tmp_path / "whole")
    whole.run()
    run = trainer(tmp_path / "run", quiet=False)
    full(monkeypatch, ("trainer.pt", "model.safetensors"), lambda: run.state.step >= 12)
    assert run.run() == "steps"
    said = capsys.readouterr().err
    assert said.count("no checkpoint:") == 2 and "the disk is full: free some space" in said and "training goes on" in said
    same(whole, run)
    assert load_trainer(run.folder)[0]["numbers"]["step"] == 12
    assert all(torch.equal(v, run.state.best_weights[k]) for k, v in load(run.folder).state_dict().items())


def test_a_run_that_cannot_be_saved_at_its_end_is_saved_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = trainer(tmp_path / "run")
    monkeypatch.setattr(files, "hook", lambda place, path: path.parent == run.folder and exec("raise OSError(28, 'No space left')"))
    with pytest.raises(CheckpointError, match=r"trainer|model.*Everything up to step 12 is in .*: --resume --out .* continues") as caught:
        run.run()
    other = next(p for p in tmp_path.iterdir() if p.name.startswith("cnf-run-"))
    assert str(other) in str(caught.value)
    monkeypatch.setattr(files, "hook", None)
    again = training(read_config(other), DATA, other, resume=True, quiet=True)
    assert again.state.step == 12
    whole = trainer(tmp_path / "whole")
    whole.run()
    same(whole, again)


def test_a_run_that_can_be_saved_nowhere_says_what_is_lost(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", steps=6)
    monkeypatch.setattr(files, "hook", lambda place, path: run.state.step > 4 and exec("raise OSError(28, 'No space left')"))
    with pytest.raises(CheckpointError, match=r"Nor could .* elsewhere.*holds it up to its last checkpoint.* to 6 are lost; --resume"):
        run.run()
    monkeypatch.setattr(files, "hook", None)
    assert load_trainer(run.folder)[0]["numbers"]["step"] == 4


def test_a_folder_that_vanishes_is_made_anew_with_everything(tmp_path, monkeypatch, capsys):
    import shutil

    whole = trainer(tmp_path / "whole")
    whole.run()
    run = trainer(tmp_path / "run", quiet=False)
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self: (self.state.step == 6 and shutil.rmtree(self.folder), update(self))[1])
    assert run.run() == "steps"
    assert f"{run.folder} was removed while this run trains: it is created again" in capsys.readouterr().err
    same(whole, run)
    assert read_config(run.folder) == run.info and load(run.folder) is not None
    assert not (run.folder / LOCK).exists() and list((run.folder / "tensorboard").iterdir())
    assert training(run.info, DATA, run.folder, resume=True, quiet=True).state.step == 12


def test_a_folder_that_another_run_has_taken_is_left_alone(tmp_path, monkeypatch):
    """The lock's file was removed by hand: what the other run writes is not written over."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = trainer(tmp_path / "run", steps=6)
    update = Trainer.update

    def taken(self):
        if self.state.step == 2:
            (self.folder / LOCK).unlink()
            (self.folder / LOCK).write_text("1 elsewhere\n")
            other.append((self.folder / LOCK).open("r+"))
            fcntl.flock(other[0], fcntl.LOCK_EX)
        return update(self)

    other = []
    monkeypatch.setattr(Trainer, "update", taken)
    with pytest.raises(CheckpointError, match=r"run is in use by process 1 on elsewhere.*Everything up to step 6 is in"):
        run.run()
    assert not (run.folder / "trainer.pt").exists() and (run.folder / LOCK).exists()
    other[0].close()


def test_tensorboard_on_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", fail)
    monkeypatch.setitem(trainers.RUN, "log_every", 1)
    assert trainer(tmp_path / "run", quiet=False).run() == "steps"
    said = capsys.readouterr().err
    assert said.count("TensorBoard's files in") == 1 and "Traceback" not in said
    assert len(logged_rows(tmp_path / "run")) == 12


# -- two processes -----------------------------------------------------------------------------------------------


@contextmanager
def held(folder):
    """The number of another process, which holds the folder's lock until it is killed; the kernel frees the lock."""
    said, say = os.pipe()
    owner = os.fork()
    if not owner:
        try:
            with locked(folder):
                os.write(say, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        os.close(say)
        assert os.read(said, 4) == b"held"
        yield owner
    finally:
        os.close(said)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)


def test_two_processes_on_one_folder(tmp_path, capsys):
    with held(tmp_path) as owner:
        with pytest.raises(ConfigError, match=rf"{tmp_path.name} is in use by process {owner}: wait for it, stop it, or"):
            training(settings(), DATA, tmp_path, quiet=True).run()
        with pytest.raises(ConfigError, match=f"in use by process {owner}"):
            training(settings(), DATA, tmp_path, resume=True, quiet=True)
        capsys.readouterr()
        assert train_main(["digits", "--max-train-rows", "50", "--hidden", "4", "--out", str(tmp_path)]) == 2
        assert f"error: {tmp_path} is in use by process {owner}: " in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    assert training(settings(steps=4), DATA, tmp_path, quiet=True).run() == "steps"
    assert not (tmp_path / LOCK).exists()


def test_a_lock_is_of_the_process_and_not_of_its_children(tmp_path):
    with locked(tmp_path), locked(tmp_path):
        assert (tmp_path / LOCK).read_text().split() == [str(os.getpid()), socket.gethostname()]

        def other():
            try:
                with locked(tmp_path):
                    return 1
            except ConfigError as error:
                return 0 if f"process {os.getppid()}:" in str(error) else 2

        assert forked(other) == 0
    first, second = os.pipe()
    child = os.fork()
    if not child:  # takes the lock, has a child that lives on, and dies
        try:
            with locked(tmp_path):
                if not os.fork():
                    time.sleep(20)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while True:  # the grandchild closes its copy as soon as it runs
        try:
            with locked(tmp_path):
                break
        except ConfigError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.close(first), os.close(second)


@pytest.mark.parametrize("number, word", [(errno.EROFS, "read-only: make it writable"), (errno.EACCES, "change the folder's permissions")])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch, number, word):
    trainer(tmp_path / "run", steps=4).run()
    real = os.open

    def refuse(path, *arguments, **options):
        if Path(path).name == LOCK:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"run cannot be written: .* \(.*{word}, or use another folder\)"):
        trainer(tmp_path / "run", resume=True)
    assert load(tmp_path / "run") is not None  # reading needs no lock


def test_a_link_in_a_strangers_folder_has_its_target_untouched(tmp_path):
    target, folder = tmp_path / "precious", tmp_path / "run"
    target.write_text("precious")
    folder.mkdir()
    (folder / LOCK).symlink_to(target)
    with pytest.raises(CheckpointError, match=r"run/\.lock cannot be written: .*it is a link, which is not followed"), locked(folder):
        pass
    files.temporary_name(folder / "a.txt").symlink_to(target)
    files.write_atomic(folder / "a.txt", lambda p: files.write_text(p, "whole"))
    assert target.read_text() == "precious" and (folder / "a.txt").read_text() == "whole\n" and not (folder / "a.txt").is_symlink()


@pytest.mark.parametrize("owner, free", [("{dead} {host}", True), ("{alive} {host}", False), ("1 elsewhere", False), ("{own} elsewhere", False), ("", True)])
def test_where_the_file_system_has_no_locks_the_number_decides(tmp_path, monkeypatch, owner, free):
    def refuse(number, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / LOCK).write_text(owner.format(dead=dead, alive=os.getppid(), own=os.getpid(), host=socket.gethostname()))
    if free:
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    else:
        with pytest.raises(ConfigError, match="in use by process"), locked(tmp_path):
            pass
    assert lock._held == {}


# -- divergence --------------------------------------------------------------------------------------------------


class Infinite(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def injected(monkeypatch, fault, steps):
    """``fault`` in the batches of ``steps``."""
    real = Likelihood.evaluate

    def evaluate(self, x, context, noise):
        solvers = {"limit": Adaptive("dopri5", 1e-6, 1e-6, max_steps=1), "runaway": FixedGrid("rk4", 60)}
        if noise.step in steps and fault in solvers:
            before = self.flow.blocks[1].solver
            self.flow.blocks[1].solver = solvers[fault]
            try:
                return real(self, x, context, noise)
            finally:
                self.flow.blocks[1].solver = before
        if noise.step in steps and fault == "state":
            with torch.no_grad():
                p = next(self.flow.blocks[1].field.parameters())
                kept = p.clone()
                p.fill_(math.nan)
            try:
                return real(self, x, context, noise)
            finally:
                p.data.copy_(kept)
        terms, stats = real(self, x, context, noise)
        if noise.step in steps:
            terms = terms | {"loss": terms["loss"] * math.nan if fault == "loss" else Infinite.apply(terms["loss"])}
        return terms, stats

    monkeypatch.setattr(Likelihood, "evaluate", evaluate)


FAULTS = {
    "loss": r"loss nan",
    "gradient": r"gradient norm (inf|nan): not finite at transform\.\S+, in block 1 of 2",
    "state": r"block 2 of 2 on events \(2,\), t 0 to 1: the state is not finite after step 1 of 2 .*\(at t = 0, step size 0\.5, largest entry \d",
    "limit": r"block 2 of 2 on events \(2,\), t 0 to 1: Adaptive.* gave up after 1 accepted.*max_num_steps exceeded.*"
    r"\(at t = 0(\.\d+)?(e-\d+)?, step size \d.*, largest entry \d",
    "runaway": r"248 evaluations, 160 at most: the solve runs away in block 2 of 2 \(240 evaluations\)",
}


@pytest.mark.parametrize("fault", mostly_slow(FAULTS, "loss", "state", "limit", "runaway"))
def test_a_fault_is_skipped_then_goes_back_then_stops_with_a_diagnosis(tmp_path, monkeypatch, fault):
    monkeypatch.setitem(trainers.POLICY, "runaway_floor", 100)
    monkeypatch.setitem(trainers.POLICY, "runaway_steps", 4)
    monkeypatch.setitem(trainers.POLICY, "max_skips", 3)
    monkeypatch.setitem(trainers.RUN, "log_every", 1)
    single, row = {5}, {9, 10, 11}
    injected(monkeypatch, fault, single | row | set(range(14, 60)))
    said, weights, rates, update = [], {}, {}, Trainer.update

    def watched(self):
        before = self.state.step
        weights[before] = [p.detach().clone() for p in self.model.parameters()]
        update(self)
        rates[before] = self.state.optimizer.param_groups[0]["lr"]

    monkeypatch.setattr(Trainer, "update", watched)
    run = trainer(tmp_path / "run", steps=60, schedule="constant")
    monkeypatch.setattr(run, "say", said.append)
    with pytest.raises(TrainingError, match=rf"3 batches in a row could not be used, the last at step 22 \(.*{FAULTS[fault]}") as caught:
        run.run()
    assert re.search(r"though the weights went back 3 times and the rate is down to 0\.125 of its schedule: try a smaller --lr", str(caught.value))
    assert any(re.search(rf"^step 5: batch skipped: .*{FAULTS[fault]}", line) for line in said)
    assert any("back to the weights of step 8, with 0.5 times the learning rate" in line for line in said)

    def equal(a, b):
        return all(torch.equal(v, w) for v, w in zip(weights[a], weights[b], strict=True))

    assert equal(5, 6) and not equal(4, 5)  # skipped: nothing changed
    assert equal(12, 8) and not equal(12, 9)  # back to those of the last validation
    assert (rates[8], rates[12], rates[17]) == (0.01, 0.005, 0.0025)
    assert [r.get("rollbacks", 0) for r in logged_rows(run.folder)][11:13] == [1, 1]


def test_an_adjoint_that_fails_backwards_names_its_block(tmp_path, monkeypatch):
    solver = SolverConfig.of(train_solver="adaptive", gradient="adjoint", rtol=1e-3, atol=1e-3)
    run = trainer(tmp_path / "run", solver=solver)
    said, before, seen = [], [p.detach().clone() for p in run.model.parameters()], []
    monkeypatch.setattr(run, "say", said.append)
    real = counted.StepFunction.callback_step_adjoint

    def limited(self, s, y, h):  # the first block is the last to be solved backwards, and its second step one too many
        real(self, s, y, h)
        seen.append(self)
        if self is not seen[0] and sum(one is self for one in seen) == 2:
            raise AssertionError("max_num_steps exceeded (2>=2)")

    monkeypatch.setattr(counted.StepFunction, "callback_step_adjoint", limited)
    run.update()
    assert run.read_metrics() is None and run.state.skipped == 1
    assert re.search(
        r"^step 0: batch skipped: the adjoint's solve failed in block 1 of 2 at s=0?\.?\d* of its time, step size \d\S*, "
        r"after \d+ evaluations: max_num_steps exceeded", said[0]
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("stops", [(6, 14), slow((1, 9))])
def test_a_run_that_went_back_and_was_interrupted_equals_one_that_was_not(tmp_path, monkeypatch, stops):
    monkeypatch.setitem(trainers.POLICY, "max_skips", 3)
    monkeypatch.setitem(trainers.RUN, "log_every", 1)
    injected(monkeypatch, "state", {5, 6, 7, 10, 13, 14, 15})
    whole = trainer(tmp_path / "whole", steps=20)
    whole.run()
    assert policy(whole).rollbacks == 2 and policy(whole).good_step == 20
    update = Trainer.update
    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "update", lambda self: (self.state.step == stop and os.kill(os.getpid(), signal.SIGTERM), update(self))[1])
            with pytest.raises(Interrupted):
                trainer(tmp_path / f"run-{stop}", steps=20).run()
        again = trainer(tmp_path / f"run-{stop}", steps=20, resume=True)
        assert again.state.step == stop + 1
        again.run()
        same(whole, again)


@pytest.mark.parametrize("where", ["forward", "backward", "validation"])
def test_a_signal_does_not_wait_for_a_long_step_or_validation(tmp_path, monkeypatch, where):
    monkeypatch.setitem(trainers.RUN, "log_every", 1)
    options = {"solver_check_every": 4, "solver_check_tolerance": 1e-9, "max_grid_steps": 8}  # the watch refines before it validates
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    finished = []

    def signalled(real, due):
        def function(self, *args, **kwargs):
            if due(args):
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(3000):  # as if it took hours; the signal may reach another thread first
                    time.sleep(0.01)
                finished.append(where)
            return real(self, *args, **kwargs)

        return function

    with monkeypatch.context() as patch:
        run = trainer(tmp_path / "run", **options)
        if where == "forward":
            patch.setattr(Likelihood, "evaluate", signalled(Likelihood.evaluate, lambda args: args[2].step == 7))
        elif where == "validation":
            patch.setattr(Likelihood, "validate", signalled(Likelihood.validate, lambda args: run.state.step == 8))
        else:
            next(run.model.parameters()).register_hook(lambda g: (run.state.step == 7 and os.kill(os.getpid(), signal.SIGTERM)) or g)
        with pytest.raises(Interrupted) as caught:
            run.run()
    assert caught.value.step == (8 if where == "validation" else 7) and not finished
    again = trainer(tmp_path / "run", resume=True, **options)
    assert again.run() == "steps"
    same(whole, again)
    assert monitor(again).refinements == monitor(whole).refinements == 2


def test_a_solver_error_names_the_block_of_the_flow():
    flow = Flow(Sequential([CNF(MLP(2), solver=FixedGrid("rk4", 4), end_time=2.0) for _ in range(3)]), (2,))
    with torch.no_grad():
        for p in flow.blocks[1].field.parameters():
            p.fill_(math.inf)
    with pytest.raises(SolverError, match=r"^block 2 of 3 on events \(2,\), t 0 to 2: .*step 1 of 4 .*\(at t = 0, step size 0\.5, largest entry \d"):
        flow.train().log_prob(torch.ones(3, 2))


# -- micro-batches -----------------------------------------------------------------------------------------------


def doubled(solver, **options):
    """A likelihood in float64 with everything that draws noise: probe, end time, regularisers."""
    torch.manual_seed(0)
    from cnf.ode.divergence import Hutchinson

    blocks = [CNF(MLP(3, hidden=(8,)), Hutchinson(), solver, steer=0.2, learn_end_time=i == 0) for i in range(2)]
    return Likelihood(Flow(Sequential(blocks), (3,)).double().train(), kinetic=0.1, jacobian=0.05)


SOLVERS = {
    "grid": FixedGrid("rk4", 4),
    "checkpoint": FixedGrid("rk4", 6, "checkpoint"),
    "adjoint": Adaptive("dopri5", 1e-10, 1e-10, "adjoint"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name):
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for count in (1, 3):  # 3, 3 and 1 rows
        objective = doubled(SOLVERS[name])
        step = gradient(objective, x, None, Noise(5, step=2), count=count)
        assert step.failure == ""
        found[count] = dict(zip(step.names, step.figures.tolist(), strict=True)), [p.grad for p in objective.parameters()]
    (told, whole), (other, parts) = found[1], found[3]
    scale = max(float(g.abs().max()) for g in whole)
    assert scale > 0.1 and max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) < 1e-6 * scale
    assert told.keys() == other.keys() >= {"loss", "nll", "kinetic", "jacobian", "nfe", "nfe_backward"}
    exact = name != "adjoint"  # whose steps are chosen for the rows that are solved together
    assert all(told[k] == pytest.approx(other[k], rel=1e-6) for k in told if exact or "nfe" not in k)


def test_micro_batches_of_a_prediction():
    from cnf.neural_ode import anode_mlp

    x, targets = torch.randn(10, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[torch.arange(10) % 3]
    torch.manual_seed(0)
    objective = Supervised(anode_mlp(2, outputs=3, augment=1).double().train(), "classification")
    found = []
    for count in (1, 4):
        objective.zero_grad()
        step = gradient(objective, x, targets, Noise(0), count=count)
        found.append((step.figures, [p.grad.clone() for p in objective.parameters()]))
    assert torch.allclose(found[0][0][:2], found[1][0][:2], rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.slow
def test_training_in_micro_batches_logs_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(trainers.RUN, "log_every", 1)
    solver = SolverConfig.of(grid_steps=2, divergence="hutchinson")
    for count in (1, 3, 100):  # more than rows: one by one
        trainer(tmp_path / str(count), accumulate=count, steps=5, solver=solver).run()
    first = logged_rows(tmp_path / "1")
    for count in (3, 100):
        for a, b in zip(first, logged_rows(tmp_path / str(count)), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("rows, count", [(7, 3), (16, 4), (5, 9), (1, 1), (10, 6)])
def test_pieces_are_the_rows(rows, count):
    parts = list(pieces(rows, count))
    assert [i for part in parts for i in range(rows)[part]] == list(range(rows)) and len(parts) <= count


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_gets_advice_with_numbers(tmp_path, monkeypatch, error):
    real = Likelihood.evaluate

    def evaluate(self, x, context, noise):
        if len(x) > 8:
            raise error
        return real(self, x, context, noise)

    monkeypatch.setattr(Likelihood, "evaluate", evaluate)
    monkeypatch.setattr("cnf.training.memory.available", lambda device: 4096)
    run = trainer(tmp_path / "run", batch_size=32)
    with pytest.raises(TrainingError, match=r"step 0: out of memory: .*A batch of 32 rows keeps about \d+ MiB .*0 MiB are free") as caught:
        run.run()
    wanted = int(re.search(r"--accumulate (\d+) takes (\d+) rows at a time", str(caught.value))[1])
    assert 4 < wanted <= 32 and "--gradient checkpoint" in str(caught.value)
    assert trainer(tmp_path / "other", batch_size=32, accumulate=wanted, steps=1).run() == "steps"


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    assert not is_oom(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr(Likelihood, "evaluate", lambda *a: exec("raise RuntimeError('something else')"))
    with pytest.raises(RuntimeError, match="something else"):
        trainer(tmp_path / "run").update()


@pytest.mark.parametrize(("losses", "said"), [([3.0, 2.0, 2.2], ""), ([3.0, 2.0, 40.0], "grown from 2 to 40: the learning rate is the likely cause, try a smaller one"), ([9.0], ""), ([], "")])
def test_a_failure_after_a_growing_loss_names_the_learning_rate(losses, said):
    lines = []
    run = SimpleNamespace(history=[{"step": 0, "loss": x} for x in losses[:1]], state=SimpleNamespace(skipped=0), say=lines.append, explain=lambda result: "the solve diverged")
    watcher = NonFinitePolicy(max_skips=2, max_rollbacks=0)
    watcher._run = run
    watcher.on_start(run)  # resumed: it knows what was logged
    for step, loss in enumerate(losses[1:], 1):
        watcher.on_metrics(run, StepResult(step, {"loss": loss, "nfe": 8, "nfe_backward": 0}))
    assert watcher.on_metrics(run, StepResult(9, {}, "the solve diverged")) is False
    with pytest.raises(TrainingError) as caught:
        watcher.on_metrics(run, StepResult(10, {}, "the solve diverged"))
    for line in (lines[0], str(caught.value).partition(", though")[0]):
        assert "the solve diverged" in line and (said in line if said else "grown" not in line)
