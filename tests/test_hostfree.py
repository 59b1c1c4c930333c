"""Between two lines of metrics.jsonl a training step reads nothing from the device, and what must not get in does not."""

import copy
import dataclasses
import math
import os
import re
import signal
import threading
import traceback

import pytest
import torch
import trainers
from conftest import logged_rows, mostly_slow, slow
from test_recovery import DATA, injected, same, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import average, policy, stop_at, training

from cnf import CNF, FixedGrid, Flow
from cnf._utils.async_checks import defer_checks, deferred
from cnf.config import DataConfig, FlowConfig, NeuralODEConfig, RunConfig, SolverConfig, TrainConfig, preset
from cnf.data import DataSplits
from cnf.errors import DataError, SolverError, TrainingError
from cnf.fields import MLP
from cnf.losses import Likelihood
from cnf.ode.divergence import Exact
from cnf.runs import RunInfo
from cnf.training import Interrupted, Trainer
from cnf.training.batches import Batches
from cnf.training.schedule import Average, adamw, learning_rate, masked_step
from cnf.transforms import Dequantize, Gaussianize, Logit, Sequential

GENERATOR = torch.Generator().manual_seed(7)
IMAGES = torch.randint(0, 256, (60, 2, 8, 8), dtype=torch.uint8, generator=GENERATOR)
GREY = torch.randint(0, 17, (60, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.eye(3)[torch.arange(60) % 3]


# -- nothing is read ---------------------------------------------------------------------------------------------

# what makes the CPU wait for a GPU: values that come to it, sizes that depend on values, and tensors that it makes of numbers
# of its own, which are copied to the device
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "lift_fresh", "bincount")
METHODS = ("tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__", "__array__", "cpu")


class Reads(TorchDispatchMode):
    """Notes every wait with the place that it comes from, and whether a step is under way."""

    def __init__(self, run, monkeypatch):
        super().__init__()
        self.run, self.found, self.inside, update = run, [], False, run.update

        def watched():
            self.inside = True
            update()
            self.inside = False

        monkeypatch.setattr(run, "update", watched)
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))

    def noting(self, name, real):
        def method(tensor, *args, **kwargs):
            self.note(name)
            return real(tensor, *args, **kwargs)

        return method

    def note(self, name):
        place = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if f"{os.sep}cnf{os.sep}" in f.filename]
        own = (f"cnf{os.sep}random.py", f"flow_matching{os.sep}times.py")  # whose numbers are the CPU's, and drawn there
        if any(f"training{os.sep}feature_history.py" in frame for frame in place):
            return  # an adaptive solve, at six steps of a run
        if not place or not place[-1].rpartition(":")[0].endswith(own):
            self.found.append((self.inside, self.run.due, name, place[-1:]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(part in str(function) for part in WAITING):
            self.note(str(function))
        return function(*args, **(kwargs or {}))


def images(x, **more):
    return DataSplits("images", "image", x[:40], x[40:50], x[50:], **more)


def labelled(data):
    return dataclasses.replace(
        data, train_context=LABELS[:40], validation_context=LABELS[40:50], test_context=LABELS[50:], classes=("a", "b", "c")
    )


DIGITS = preset("digits").config
POINTS = torch.randn(60, 3, generator=GENERATOR)
TABLE = DataSplits("table", "table", POINTS[:40], POINTS[40:50], POINTS[50:])
GRID = SolverConfig.of(grid_steps=2, divergence="hutchinson", gradient="checkpoint", steer=0.1)
RUNS = {
    "digits": (images(GREY, levels=17), DIGITS.model, DIGITS.solver, {}),
    "penalty": (images(GREY, levels=17), DIGITS.model.change(hidden=(8, 8)), DIGITS.solver, {"jacobian": 0.01}),
    "conv": (
        images(IMAGES, levels=256, flip=True), FlowConfig.of(architecture="multiscale", field="conv", hidden=(4,), time_conditioning="concat", preprocess="logit", dequantize="variational"),
        GRID, {"kinetic": 0.01, "jacobian": 0.01, "accumulate": 2},
    ),
    "affjord": (
        images(IMAGES, levels=256), FlowConfig.of(field="conv", hidden=(4,), time_conditioning="concat", preprocess="standardize", augmented_time="hyper"), GRID, {},
    ),
    "tangents": (TABLE, FlowConfig.of(hidden=(6, 6, 6), time_conditioning="concat", learn_end_time=True), SolverConfig.of(grid_steps=2), {"jacobian": 0.01}),
    "matching": (
        images(IMAGES, levels=256), FlowConfig.of(field="unet", hidden=(4,), unet_depth=1, dequantize="truncated-normal", preprocess="center"),
        SolverConfig.of(divergence="hutchinson"), {"objective": "flow-matching"},
    ),
    "predictor": (
        labelled(images(IMAGES, levels=256)), NeuralODEConfig.of(field="conv", hidden=(4, 4), time_conditioning="concat", augment=1), SolverConfig.of(grid_steps=2),
        {"objective": "classification"},
    ),
    "regression": (
        labelled(TABLE), NeuralODEConfig.of(hidden=(6, 6), input_layer=True, data_control=True, adaptive_depth=True, augment=1, time_conditioning="concat"),
        SolverConfig.of(grid_steps=2), {"objective": "regression"},
    ),
}  # fmt: skip


def run_of(folder, name, **more):
    data, model, solver, train = RUNS[name]
    config = TrainConfig.of(**{"steps": 8, "batch_size": 8, "validate_every": 100, "solver_check_every": 100} | train | more)
    solver = solver.change(eval_rtol=1e-2, eval_atol=1e-2)
    folder.mkdir()
    info = RunInfo(RunConfig("run", DataConfig(), model, solver, config), data.event_shape, data.levels, data.context_dim, (), ())
    return training(info, data, folder, quiet=True)


@pytest.mark.parametrize("name", RUNS)
def test_between_log_lines_nothing_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setitem(trainers.RUN, "log_every", 3)
    run = run_of(tmp_path / "run", name, steps=4)
    with monkeypatch.context() as patch, Reads(run, patch) as reads:
        assert run.run() == "steps"
    assert [read for read in reads.found if read[0] or not read[1]] == []
    assert reads.found  # at steps 3 and 4, so that they would have been seen
    found = logged_rows(run.folder)
    assert [row["step"] for row in found] == [3, 4] and math.isfinite(found[0]["loss"])


def test_the_counter_counts(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", "tangents")
    with monkeypatch.context() as patch, Reads(run, patch) as reads:
        x = torch.ones(3)
        for read in (x.sum().item, x.tolist, x.any().__bool__, x.nonzero, lambda: torch.tensor([1.0, 2.0]), lambda: float(x[0])):
            before = len(reads.found)
            read()
            assert len(reads.found) > before
        before = len(reads.found)
        x.masked_fill(x > 0, 2.0).new_full((), 3.0).add(x.argmax())
        assert len(reads.found) == before
    adaptive = RUNS["tangents"][2].change(train_solver="adaptive", method="dopri5")
    monkeypatch.setitem(RUNS, "adaptive", (TABLE, FlowConfig.of(hidden=(6,)), adaptive, {}))
    run = run_of(tmp_path / "adaptive", "adaptive")
    with monkeypatch.context() as patch, Reads(run, patch) as reads:
        run.update()
    assert any(inside for inside, *_ in reads.found)  # its steps depend on values


# -- nothing gets in ---------------------------------------------------------------------------------------------


def everything(run):
    """Weights, moments, counters and average."""
    state = {f"{i}.{k}": v for i, one in run.state.optimizer.state_dict()["state"].items() for k, v in one.items()}
    for name, part in (("flow", run.model), ("ema", average(run))):
        state |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
    return {k: v.clone() for k, v in state.items()}


@pytest.mark.parametrize("fault", ["loss", "gradient", "state"])
def test_a_batch_that_is_not_finite_changes_nothing_before_anybody_looks(tmp_path, monkeypatch, fault):
    injected(monkeypatch, fault, {2, 3})
    run = trainer(tmp_path / "run")
    states = [everything(run)]
    for _ in range(5):
        run.update()
        run.state.step += 1
        states.append(everything(run))
    moved = [any(k not in a or not torch.equal(a[k], v) for k, v in b.items()) for a, b in zip(states, states[1:], strict=False)]
    assert moved == [True, True, False, False, True] and run.state.skipped == 0
    assert int(states[-1]["ema.n_averaged"]) == 3 == int(states[-1]["0.step"])
    assert all(bool(v.isfinite().all()) for v in states[-1].values())
    run.read_metrics()
    assert run.state.skipped == 2


@pytest.mark.parametrize("fault, decay", [
    ("loss", 0.9), ("gradient", 0.0), ("state", 0.9), ("limit", 0.0),
    slow("loss", 0.0), slow("gradient", 0.9), slow("state", 0.0), slow("limit", 0.9),
])  # fmt: skip
def test_the_run_is_the_one_in_which_those_batches_were_left_out(tmp_path, monkeypatch, fault, decay):
    bad = {0, 4, 5, 11}
    plain = trainer(tmp_path / "plain", ema_decay=decay, steps=20)
    update = Trainer.update
    with monkeypatch.context() as patch:  # the host leaves them out, and never computes them
        patch.setattr(Trainer, "update", lambda self: None if self.state.step in bad else update(self))
        plain.run()
    injected(monkeypatch, fault, bad)
    run = trainer(tmp_path / "run", ema_decay=decay, steps=20)
    run.run()
    mine, other = everything(run), everything(plain)
    assert mine.keys() == other.keys() and [k for k in mine if not torch.equal(mine[k], other[k])] == []
    assert run.state.skipped == 4 and (run.state.best, run.state.best_step) == (plain.state.best, plain.state.best_step)


def test_steps_and_average_are_the_textbooks(tmp_path):
    """Against torch's plain AdamW and the average written out, with two batches left out by the host."""
    decay, bad = 0.9, {1, 4}
    run = trainer(tmp_path / "run", ema_decay=decay, weight_decay=0.1, max_grad_norm=0.5)
    config = run.config
    twin = trainer(tmp_path / "twin")
    adam = torch.optim.AdamW(twin.model.parameters(), weight_decay=0.1, fused=False, foreach=False)
    average, taken = None, 0
    for step in range(8):
        run.update() if step not in bad else None
        run.state.step += 1
        if step in bad:
            continue
        x, context, noise = twin.batches(step)
        adam.zero_grad()
        twin.objective.train().evaluate(x, context, noise)[0]["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 0.5)
        adam.param_groups[0]["lr"] = learning_rate(step, config.lr, config.warmup, config.steps, config.schedule)
        adam.step()
        now = [p.detach().double() for p in twin.model.parameters()]
        d = min(decay, (1 + taken) / (10 + taken))
        average = now if average is None else [d * a + (1 - d) * b for a, b in zip(average, now, strict=True)]
        taken += 1
    for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
    for p, q in zip(run.averaged().parameters(), average, strict=True):
        assert torch.allclose(p.double(), q, rtol=1e-4, atol=1e-6)


def test_the_optimiser_takes_up_what_another_implementation_left():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    other = torch.nn.Linear(3, 2).double()
    other.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(other.parameters(), 0.01, foreach=False)
    x = torch.randn(6, 4, 3, dtype=torch.float64)

    def gradient(of, step):
        of.zero_grad()
        of(x[step]).square().mean().backward()

    for step in range(3):
        gradient(other, step)
        plain.step()
    model.load_state_dict(other.state_dict())
    mine = adamw(model, 0.01, 0.01)
    mine.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert all(group["fused"] for group in mine.param_groups)
    for step in range(3, 6):
        gradient(model, step)
        before = [p.detach().clone() for p in model.parameters()]
        masked_step(mine, torch.tensor(False))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        masked_step(mine, torch.tensor(True))
        gradient(other, step)
        plain.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
        assert float(mine.state[a]["step"]) == float(plain.state[b]["step"]) == 6


def test_an_average_that_was_masked_from_the_start_still_copies_first():
    model = torch.nn.Linear(3, 2)
    average = Average(model, 0.99)
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.update_parameters(model, torch.tensor(False))
    assert int(average.n_averaged) == 0 and not torch.equal(average.module.weight, model.weight)
    average.update_parameters(model, torch.tensor(True))
    assert int(average.n_averaged) == 1 and torch.equal(average.module.weight, model.weight)


def test_an_average_counts_where_its_weights_are():
    model = torch.nn.Linear(3, 2, device="meta")  # what is taken is only known there, and is added to the count
    average = Average(model, 0.99)
    assert average.n_averaged.device == average.module.weight.device == torch.device("meta")


def test_validations_are_not_rounded_to_tf32_and_leave_the_setting_alone(tmp_path, monkeypatch):
    run, seen, parts = trainer(tmp_path / "run", steps=1), [], (torch.backends.cudnn, torch.backends.cuda.matmul)
    validate = Likelihood.validate
    record = lambda *a, **k: (seen.append([part.allow_tf32 for part in parts]), validate(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(Likelihood, "validate", record)
    before = [part.allow_tf32 for part in parts]
    assert before[0]  # torch's own default, for convolutions
    run.run()
    assert seen == [[False, False]] and [part.allow_tf32 for part in parts] == before


# -- what is told ------------------------------------------------------------------------------------------------


def test_lines_and_messages_tell_the_skipped_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(trainers.RUN, "log_every", 5)
    injected(monkeypatch, "state", {1, 3, 9, 12})
    run = trainer(tmp_path / "run", steps=16, validate_every=8)
    said, evaluated, evaluate = [], [], Likelihood.evaluate
    monkeypatch.setattr(run, "say", lambda line: said.append((run.state.step, line)))
    monkeypatch.setattr(Likelihood, "evaluate", lambda self, x, c, n: (evaluated.append((n.step, torch.is_grad_enabled())), evaluate(self, x, c, n))[1])
    run.run()
    assert [at for at, line in said if "skipped" in line] == [5, 5, 10, 15]  # told at the next line, the first ones together
    where = r"batch skipped: block 2 of 2 on events \(2,\), t 0 to 1: the state is not finite after step 1 of 2"
    for step, (_, line) in zip((1, 3, 9, 12), said, strict=True):
        assert re.match(rf"step {step}: {where}", line)
    assert [(step, grad) for step, grad in evaluated if not grad] == [(step, False) for step in (1, 3, 9, 12)]  # to say where
    found = logged_rows(run.folder)
    assert [(row["step"], row["skipped"], "nll" in row) for row in found] == [
        (5, 2, True), (8, 2, True), (10, 3, False), (15, 4, True), (16, 4, True),
    ]  # fmt: skip


@pytest.mark.parametrize("fault, text", [
    ("loss", r"step 3: batch skipped: loss nan$"),
    ("gradient", r"step 3: batch skipped: loss \S+, gradient norm (inf|nan): not finite at transform\.\S+, in block 1 of 2$"),
])  # fmt: skip
def test_what_cannot_be_solved_again_is_named_all_the_same(tmp_path, monkeypatch, fault, text):
    """Read two steps later, when the gradient is another."""
    injected(monkeypatch, fault, {3})
    run = trainer(tmp_path / "run", steps=6, validate_every=6)
    said = []
    monkeypatch.setattr(run, "say", said.append)
    run.run()
    assert len(said) == 1 and re.match(text, said[0])


def test_a_fault_that_was_gone_by_the_time_is_named_by_its_terms(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", steps=4)
    said, real = [], run.objective.evaluate

    def evaluate(x, context, noise):
        terms, stats = real(x, context, noise)
        return ({k: v * math.nan for k, v in terms.items()} if run.state.step == 1 else terms), stats

    monkeypatch.setattr(run.objective, "evaluate", evaluate)
    monkeypatch.setattr(run, "say", said.append)
    run.run()
    assert said == ["step 1: batch skipped: loss nan, nll nan, kinetic nan"]


def test_of_several_processes_all_say_why(tmp_path, monkeypatch):
    injected(monkeypatch, "state", {1})
    run = trainer(tmp_path / "run", steps=4)
    asked, said = [], []

    class Pair:
        size = 2

        def reasons(self, failure):
            asked.append(failure)
            return f"rank 0: {failure}"

    for _ in range(3):
        run.update()
        run.state.step += 1
    monkeypatch.setattr(run, "say", said.append)
    monkeypatch.setattr(run, "group", Pair())
    run.read_metrics()
    assert len(asked) == 1 and re.match(r"step 1: batch skipped: rank 0: block 2 of 2 on events", said[0])


def test_a_failed_solve_is_judged_at_once(tmp_path, monkeypatch):
    injected(monkeypatch, "limit", {2})
    run = trainer(tmp_path / "run", steps=12, validate_every=12)
    said = []
    monkeypatch.setattr(run, "say", lambda line: said.append(run.state.step))
    run.run()
    assert said == [3] and [row["step"] for row in logged_rows(run.folder)] == [10, 12]


def test_a_run_stopped_by_time_has_counted_all_its_steps(tmp_path, monkeypatch):
    injected(monkeypatch, "loss", {5, 6})
    run = trainer(tmp_path / "run", steps=40, validate_every=40)
    stop_at(run, 7)
    assert run.run() == "max_time" and run.state.skipped == 2
    state = torch.load(run.folder / "trainer.pt", weights_only=True)
    assert state["numbers"]["skipped"] == 0 and len(state["results"]) == 7  # for who resumes they are not judged yet


def test_reading_in_between_for_the_bar_changes_nothing(tmp_path, monkeypatch, capsys):
    injected(monkeypatch, "state", {3, 4, 5, 8})
    monkeypatch.setitem(trainers.POLICY, "max_skips", 3)
    monkeypatch.setitem(trainers.RUN, "log_every", 7)
    whole = trainer(tmp_path / "whole", steps=20, validate_every=10)
    whole.run()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(trainers.BAR, "read_seconds", -1.0)
    run = trainer(tmp_path / "run", steps=20, validate_every=10, quiet=False)
    run.run()
    same(whole, run)
    shown = capsys.readouterr().err
    assert policy(run).rollbacks == 1 and "20/20" in shown and " nats, NFE 16, " in shown


# -- going back, and resuming ------------------------------------------------------------------------------------

# three in a row at 2 to 4, judged at 7, so that 5 and 6 (bad, and good) are void; 9; three in a row across lines, 12 to 14
FAULTS = {2, 3, 4, 5, 9, 12, 13, 14, 15}


def faulty(monkeypatch):
    monkeypatch.setitem(trainers.POLICY, "max_skips", 3)
    monkeypatch.setitem(trainers.RUN, "log_every", 7)
    injected(monkeypatch, "state", FAULTS)
    return {"steps": 24, "validate_every": 12, "solver_check_every": 17}


def test_going_back_is_late_by_no_more_than_a_line_and_voids_what_came_after(tmp_path, monkeypatch):
    options, said, weights = faulty(monkeypatch), [], {}
    run = trainer(tmp_path / "run", **options)
    update = run.update
    monkeypatch.setattr(run, "update", lambda: (weights.update({run.state.step: everything(run)}), update())[1])
    monkeypatch.setattr(run, "say", lambda line: said.append((run.state.step, line)))
    run.run()
    back = [(at, line) for at, line in said if "back to the weights" in line]
    assert [at for at, _ in back] == [7, 17]
    assert "the last at step 4 " in back[0][1] and "weights of step 0, with 0.5 " in back[0][1]
    assert "the last at step 14 " in back[1][1] and "weights of step 12, with 0.5 " in back[1][1]
    flow = [k for k in weights[7] if k.startswith("flow.")]
    assert all(torch.equal(weights[7][k], weights[0][k]) for k in flow) and not all(torch.equal(weights[6][k], weights[0][k]) for k in flow)
    assert run.state.skipped == len(FAULTS) and policy(run).rollbacks == 2
    found = {row["step"]: row for row in logged_rows(run.folder)}
    assert list(found) == [7, 12, 14, 17, 21, 24]
    assert [("nll" in row, row["skipped"], row.get("rollbacks", 0)) for row in found.values()] == [
        (False, 4, 1), (True, 5, 1), (False, 7, 1), (False, 9, 2), (True, 9, 2), (True, 9, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("stop", mostly_slow([1, 3, 5, 8, 12, 14, 16], 3, 5, 16))
def test_interrupted_between_lines_and_resumed_equals_never_stopped(tmp_path, monkeypatch, stop):
    options = faulty(monkeypatch)
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    update = Trainer.update
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", lambda self: (self.state.step == stop and os.kill(os.getpid(), signal.SIGTERM), update(self))[1])
        with pytest.raises(Interrupted):
            trainer(tmp_path / "run", **options).run()
    again = trainer(tmp_path / "run", resume=True, **options)
    assert again.state.step == stop + 1 and (len(again.state.metrics) > 0) == (stop + 1 not in (7, 12, 14, 17))
    again.run()
    same(whole, again)
    assert policy(again).skips_in_row == policy(whole).skips_in_row and policy(again).recent_nfe == policy(whole).recent_nfe


def test_killed_after_any_save_equals_never_stopped(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    options = faulty(monkeypatch)
    monkeypatch.setitem(trainers.CHECKPOINTER, "save_seconds", -1.0)  # after every step
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    update, stops = Trainer.update, [2, 6, 11, 15, 16, 22]

    def killed(self):
        if stops and self.state.step == stops[0]:
            del stops[0]
            raise Killed
        update(self)

    monkeypatch.setattr(Trainer, "update", killed)
    resume = False
    while stops:
        with pytest.raises(Killed):
            trainer(tmp_path / "run", resume=resume, **options).run()
        resume = True
    again = trainer(tmp_path / "run", resume=True, **options)
    again.run()
    same(whole, again)


def test_a_signal_while_it_is_found_out_why_leaves_the_rest_to_who_resumes(tmp_path, monkeypatch):
    options = faulty(monkeypatch)
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    evaluate, told = Likelihood.evaluate, []

    def signalled(self, x, context, noise):
        if not torch.is_grad_enabled() and noise.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # the signal is obeyed at the next instruction
                pass
            told.append("not abandoned")
        return evaluate(self, x, context, noise)

    with monkeypatch.context() as patch:
        patch.setattr(Likelihood, "evaluate", signalled)
        run = trainer(tmp_path / "run", **options)
        with pytest.raises(Interrupted):
            run.run()
    assert run.state.step == 7 and run.state.skipped == 1 and len(run.state.metrics) == 4 and not told
    again = trainer(tmp_path / "run", resume=True, **options)
    again.run()
    same(whole, again)


def test_too_many_in_a_row_stop_with_their_last_step(tmp_path, monkeypatch):
    injected(monkeypatch, "loss", set(range(5, 100)))
    run = trainer(tmp_path / "run", steps=100, validate_every=20)
    with pytest.raises(TrainingError, match=r"10 batches in a row could not be used, the last at step 49 \(loss nan\).*went back 3 times"):
        run.run()  # judged at 20 (5 to 14), 30 (20 to 29), 40 and 50


def test_a_checkpoint_of_an_earlier_version_is_taken_up(tmp_path):
    """Its parts had other names, its optimiser is not fused, and all was judged at once."""
    from cnf.runs import save_trainer

    run = trainer(tmp_path / "run", steps=8)
    stop_at(run, 4)
    run.run()
    state = torch.load(run.folder / "trainer.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    callbacks, numbers = state["callbacks"], state["numbers"]
    known = callbacks["NonFinitePolicy"]
    good = {{"model": "flow", "average": "ema"}.get(name, name): part for name, part in known["good"].items()}
    numbers |= {"stage": numbers.pop("phase"), "skips_in_row": known["skips_in_row"]}
    save_trainer(run.folder, {
        "flow": state["model"], "ema": callbacks["WeightAverage"], "optimizer": state["optimizer"], "best_weights": state["best_weights"],
        "numbers": numbers, "refinements": 0, "pending": {}, "metrics": state["rows"], "data": state["data"],
        "recovery": {"rollbacks": 0, "usual": known["recent_nfe"], "good_step": known["good_step"], "good": good},
    })  # fmt: skip
    again = trainer(tmp_path / "run", resume=True, steps=8)
    assert again.state.step == 4 and again.run() == "steps"
    whole = trainer(tmp_path / "whole", steps=8)
    whole.run()
    for part in ("model", "optimizer", "average"):
        one, other = (run.snapshot()[part] for run in (whole, again))
        one, other = (x["state"] if part == "optimizer" else x for x in (one, other))
        assert torch.equal(torch.cat([v.flatten().double() for v in values(one)]), torch.cat([v.flatten().double() for v in values(other)]))


def values(state):
    return [v for part in state.values() for v in (part.values() if isinstance(part, dict) else (part,))]


# -- checks that are deferred, and those that are made before ----------------------------------------------------


def blown_up():
    flow = Flow(CNF(MLP(2), solver=FixedGrid("rk4", 2)), (2,)).train()
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(math.inf)
    return flow


def test_checks_are_deferred_inside_and_in_this_thread_alone():
    flow, x = blown_up(), torch.ones(3, 2)
    seen = []
    with defer_checks():
        with defer_checks():
            assert deferred()
        assert deferred() and not bool(flow.log_prob(x).isfinite().any())
        thread = threading.Thread(target=lambda: seen.append(deferred()))
        thread.start()
        thread.join()
    assert seen == [False] and not deferred()
    with pytest.raises(SolverError, match="not finite after step 1 of 2"):
        flow.log_prob(x)
    with pytest.raises(ZeroDivisionError), defer_checks():
        _ = 1 / 0
    assert not deferred()


@pytest.mark.parametrize("transform", [Logit(0.01), Gaussianize((2,), 4)])
def test_what_lies_outside_comes_out_not_finite(transform):
    x = torch.tensor([[0.5, 0.5], [0.5, 1.5], [math.nan, 0.5]])
    with defer_checks():
        value, log_det, *_ = transform(x)
    assert (value.isfinite().all(1) & log_det.isfinite()).tolist() == [True, False, False]
    with pytest.raises(DataError):
        transform(x)


def test_shapes_and_types_are_checked_all_the_same():
    flow = Flow(CNF(MLP(2)), (2,))
    with defer_checks():
        for wrong in (torch.ones(3, 3), torch.ones(3, 2).long(), torch.ones(3, 2).double()):
            with pytest.raises(DataError):
                flow.log_prob(wrong)
        with pytest.raises(DataError):
            Sequential([Dequantize(17), Logit(0.01)])(torch.ones(3, 2).long())


def test_training_data_are_looked_at_before_the_first_step(monkeypatch):
    x = DATA.train.clone()
    x[37, 1] = math.nan
    with pytest.raises(DataError, match="NaN or infinity, first in row 37"):
        Batches(dataclasses.replace(DATA, train=x), 16, 0, torch.device("cpu"))
    pixels = GREY.clone()
    pixels[25, 0, 3, 3] = 17
    with pytest.raises(DataError, match="a pixel of the training data is 17, but levels=17"):
        Batches(images(pixels, levels=17), 16, 0, torch.device("cpu"))
    assert Batches(images(GREY, levels=17), 16, 0, torch.device("cpu")).x.dtype == torch.uint8


def test_the_exact_trace_in_chunks_is_autograds():
    field, x = MLP(5, (6, 6, 6), layer="concat").double(), torch.randn(4, 5, dtype=torch.float64, generator=GENERATOR)
    t = torch.tensor(0.3, dtype=torch.float64)
    for chunk in (None, 1, 2, 3, 5):
        exact = Exact(chunk=chunk) if chunk else Exact()
        found = exact.linearize(field, t, x, None, None, frozenset({"div", "jac_sq"}))
        for i in range(4):
            jacobian = torch.autograd.functional.jacobian(lambda y: field(t, y[None], None)[0], x[i])
            assert float(found.div[i].detach()) == pytest.approx(float(jacobian.trace()), rel=1e-12)
            assert float(found.jac_sq[i].detach()) == pytest.approx(float(jacobian.square().sum()), rel=1e-12)
