"""The training loop: resuming equals never having stopped, and nothing non-finite gets in."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
import trainers
from conftest import logged_rows, slow
from trainers import average, monitor, policy, training

from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.errors import CheckpointError, SolverError, TrainingError
from cnf.evaluation import evaluate
from cnf.losses import Likelihood, density
from cnf.random import Noise
from cnf.runs import RunInfo, load, save_trainer
from cnf.solvers import FixedGrid
from cnf.training import Interrupted, Trainer
from cnf.training.batches import Batches, validation_rows
from cnf.training.cost import measure
from cnf.training.loggers import RunLogger
from cnf.training.loop import VALIDATION_SEED
from cnf.training.schedule import Average, learning_rate
from cnf.training.state import TrainState

GENERATOR = torch.Generator().manual_seed(3)
POINTS = torch.randn(90, 2, generator=GENERATOR) * torch.tensor([0.3, 1.0]) + torch.tensor([2.0, 0.0])
DATA = DataSplits("points", "table", POINTS[:50], POINTS[50:70], POINTS[70:])
MODEL = FlowConfig.of(hidden=(8,), zero_init=False)


def settings(model=MODEL, solver=None, **train):
    train = {"steps": 12, "batch_size": 16, "warmup": 3, "lr": 0.01, "validate_every": 4, "solver_check_every": 3, "kinetic": 0.01} | train
    config = RunConfig("points", DataConfig(), model, solver or SolverConfig.of(grid_steps=2), TrainConfig.of(**train))
    return RunInfo(config, (2,), None, 0, (), ("column 0", "column 1"))


def trainer(folder, *, data=DATA, resume=False, quiet=True, **options):
    folder.mkdir(exist_ok=True)
    return training(settings(**options), data, folder, resume=resume, quiet=quiet)


def tensors(run):
    """Everything that training has changed."""
    optimizer = run.state.optimizer.state_dict()["state"]
    state = {f"optimizer.{i}.{k}": v for i, one in optimizer.items() for k, v in one.items()}
    for name, part in (("flow", run.model.state_dict()), ("ema", average(run).state_dict()), ("best", run.state.best_weights)):
        state |= {f"{name}.{k}": v for k, v in part.items()}
    return state


def assert_same(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []
    for name in TrainState.NUMBERS[:-1]:
        assert getattr(one.state, name) == getattr(other.state, name), name
    assert monitor(one).refinements == monitor(other).refinements
    assert logged_rows(one.folder) == logged_rows(other.folder)


def before_update(monkeypatch, hook):
    """Call ``hook(trainer)`` before every optimiser step."""
    real = Trainer.update

    def update(self):
        hook(self)
        return real(self)

    monkeypatch.setattr(Trainer, "update", update)


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setitem(trainers.RUN, "log_every", 1)


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [slow(2), slow(4), 7])  # before any validation, at one, between two
def test_interrupted_and_resumed_equals_never_stopped(tmp_path, monkeypatch, every_step, stop):
    tight = {"solver_check_tolerance": 1e-9, "max_grid_steps": 8}  # so the watch refines, before and after the interruption
    whole = trainer(tmp_path / "whole", **tight)
    assert whole.run() == "steps"
    assert monitor(whole).refinements == 2

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        before_update(patch, lambda run: run.state.step == stop and os.kill(os.getpid(), signal.SIGINT))
        first = trainer(tmp_path / "parts", **tight)
        with pytest.raises(Interrupted) as caught:
            first.run()
    assert (caught.value.number, caught.value.step) == (signal.SIGINT, stop + 1)  # the step under way is finished
    assert signal.getsignal(signal.SIGINT) is before  # a shell's background jobs ignore it
    assert (first.folder / "model.safetensors").exists() == (stop + 1 >= 4)  # interrupted, it does not validate out of turn
    second = trainer(tmp_path / "parts", resume=True, **tight)
    assert second.state.step == stop + 1 and len(logged_rows(second.folder)) == stop + 1
    assert second.run() == "steps"
    assert_same(whole, second)
    assert [r["step"] for r in logged_rows(second.folder)] == list(range(1, 13))
    assert second.state.seconds >= first.state.seconds


def test_killed_between_checkpoints_equals_never_stopped(tmp_path, monkeypatch, every_step):
    whole = trainer(tmp_path / "whole")
    whole.run()

    class Killed(BaseException):
        pass

    def kill(run):
        if run.state.step == 7:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_update(patch, kill)
        trainer(tmp_path / "parts").run()
    path = tmp_path / "parts" / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 7  # three more than the checkpoint knows
    path.write_text(path.read_text() + '{"step": 8, "lo')
    second = trainer(tmp_path / "parts", resume=True)
    assert second.state.step == 4 and len(logged_rows(tmp_path / "parts")) == 4
    second.run()
    assert_same(whole, second)


def test_killed_before_the_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    run = trainer(tmp_path / "run", resume=True)
    assert run.state.step == 0 and logged_rows(tmp_path / "run") == []


def test_resume_with_other_data_is_refused(tmp_path):
    trainer(tmp_path / "run", steps=4).run()
    other = dataclasses.replace(DATA, train=DATA.train + 1e-6)
    with pytest.raises(CheckpointError, match="the data are not those"):
        trainer(tmp_path / "run", data=other, resume=True)


def test_resume_of_another_model_is_refused(tmp_path):
    trainer(tmp_path / "run", steps=4).run()
    with pytest.raises(CheckpointError, match=r"trainer\.pt is not of this model"):
        trainer(tmp_path / "run", model=FlowConfig.of(hidden=(9,)), resume=True)


def test_checkpoint_with_odd_contents_is_refused(tmp_path):
    trainer(tmp_path / "run", steps=4).run()
    path = tmp_path / "run" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    state["numbers"] = {"run": "not a method any more", "step": "4"}
    save_trainer(path.parent, state)
    with pytest.raises(CheckpointError, match="not of this model"):
        trainer(tmp_path / "run", steps=4, resume=True)


def test_a_later_best_is_void_after_going_back(tmp_path):
    run = trainer(tmp_path / "run", steps=8)
    run.run()
    path = tmp_path / "run" / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(b"from after the checkpoint")
    trainer(tmp_path / "run", steps=8, resume=True)
    assert path.read_bytes() == kept


# -- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, end", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, number, end):
    def twice(run):
        if run.state.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    before_update(monkeypatch, twice)
    run = trainer(tmp_path / "run")
    with pytest.raises(end) as caught:
        run.run()
    assert number == signal.SIGINT or caught.value.code == 143
    assert run.state.step == 2


def test_patience_stops_keeps_the_best_and_survives_resume(tmp_path, monkeypatch):
    values = {4: 3.0, 8: 1.0, 12: 2.0, 16: math.nan, 20: 0.5}

    def fake(flow, x, *args, **kwargs):
        return dataclasses.replace(found, mean=values[current.state.step])

    current = trainer(tmp_path / "run", steps=40, patience=2)
    found = evaluate(current.best_model() if current.state.best_weights else current.model.eval(), DATA.validation)
    monkeypatch.setattr(density, "evaluate", fake)
    taken = []
    before_update(monkeypatch, lambda run: taken.append(run.state.step) or (run.state.step == 13 and os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Interrupted) as caught:
        current.run()
    assert caught.value.number == signal.SIGTERM and current.state.worse == 1
    current = trainer(tmp_path / "run", steps=40, patience=2, resume=True)
    assert current.run() == "patience"
    assert (current.state.step, current.state.best, current.state.best_step, current.state.worse) == (16, 1.0, 8, 2)
    assert taken == list(range(16))
    again = trainer(tmp_path / "run", steps=40, patience=2, resume=True)
    assert again.stop_reason() == "patience" and again.run() == "patience"
    assert again.state.step == 16 and taken == list(range(16))  # not one step more
    current = trainer(tmp_path / "run", steps=20, patience=3, resume=True)
    assert current.run() == "steps" and (current.state.best, current.state.best_step) == (0.5, 20)
    weights = load_state(tmp_path / "run")
    assert all(torch.equal(weights[k], v) for k, v in current.state.best_weights.items())


def load_state(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))


def test_time_limit_counts_one_call_and_ends_with_a_validation(tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    before_update(monkeypatch, lambda run: setattr(clock, "now", clock.now + 1.0))
    monkeypatch.setitem(trainers.RUN, "clock", clock.monotonic)
    run = trainer(tmp_path / "run", steps=40, max_time=5.0)
    assert run.run() == "max_time"
    assert (run.state.step, run.state.validated, run.state.seconds) == (5, 5, 5.0)
    assert logged_rows(run.folder)[-1]["step"] == 5 and "validation" in logged_rows(run.folder)[-1]
    run = trainer(tmp_path / "run", steps=40, max_time=5.0, resume=True)
    assert run.run() == "max_time"
    assert (run.state.step, run.state.seconds) == (10, 10.0)


def test_a_run_stopped_by_time_selects_what_it_would_have_selected(tmp_path, monkeypatch):
    """The validation that time brings about is for the test alone: resumed, the run equals one that never stopped."""
    whole = trainer(tmp_path / "whole", steps=24, validate_every=8)
    whole.run()
    run = trainer(tmp_path / "run", steps=24, validate_every=8)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_stop", lambda self: "max_time" if self.state.step >= 13 else None)
        assert run.run() == "max_time" and run.state.validated == 13
    run = trainer(tmp_path / "run", steps=24, validate_every=8, resume=True)
    assert (run.state.step, run.state.validated) == (13, 8)
    assert run.run() == "steps"
    for name, value in whole.state.best_weights.items():
        assert torch.equal(value, run.state.best_weights[name]), name
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in logged_rows(whole.folder)]
    assert kept == [{k: v for k, v in row.items() if k != "seconds"} for row in logged_rows(run.folder)]


def test_the_test_set_is_not_read(tmp_path):
    run = trainer(tmp_path / "run", data=dataclasses.replace(DATA, test=None), steps=4)
    assert run.run() == "steps"


# -- what must not get in ----------------------------------------------------------------------------------------


def failing(monkeypatch, steps, how):
    """Batches of ``steps`` fail in the way ``how``."""
    real = Likelihood.evaluate

    def evaluate(self, x, context, noise):
        terms, stats = real(self, x, context, noise)
        if noise.step in steps:
            if how == "solver":
                raise SolverError("the state is not finite")
            terms = terms | {"loss": terms["loss"] * math.nan if how == "loss" else InfiniteGradient.apply(terms["loss"])}
        return terms, stats

    monkeypatch.setattr(Likelihood, "evaluate", evaluate)


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("how", ["loss", "gradient", "solver"])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, every_step, how):
    failing(monkeypatch, {1, 2, 5}, how)
    run = trainer(tmp_path / "run", steps=7)
    states = []
    before_update(monkeypatch, lambda r: states.append({k: v.clone() for k, v in tensors(r).items()}))
    run.run()
    assert run.state.skipped == 3 and policy(run).skips_in_row == 0
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(states, states[1:], strict=False)]
    assert same == [False, True, True, False, False, True]  # a skipped batch changes nothing at all
    assert [r["skipped"] for r in logged_rows(run.folder)] == [0, 1, 2, 2, 2, 3, 3]
    assert ["nll" in r for r in logged_rows(run.folder)] == [True, False, False, True, True, False, True]
    assert all(bool(torch.isfinite(v).all()) for v in tensors(run).values())


def test_too_many_in_a_row_stop_with_advice(tmp_path, monkeypatch, every_step):
    failing(monkeypatch, set(range(5, 100)), "loss")
    run = trainer(tmp_path / "run", steps=60)
    with pytest.raises(TrainingError, match=r"10 batches in a row.* step 44 \(loss nan.*--lr \(now 0\.01\).*--warmup.*--grid-steps \(now 2\)"):
        run.run()
    assert torch.load(run.folder / "trainer.pt", weights_only=True)["numbers"]["step"] == 44  # the latest validation


def test_failed_validation_is_infinite_and_later_ones_win(tmp_path, monkeypatch):
    real, calls = density.evaluate, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise SolverError("too many steps")
        found = real(*args, **kwargs)
        return dataclasses.replace(found, mean=math.nan) if len(calls) == 1 else found

    monkeypatch.setattr(density, "evaluate", sometimes)
    run = trainer(tmp_path / "run")
    run.run()
    assert run.state.best_step == 12 and math.isfinite(run.state.best)
    found = [r["validation"] for r in logged_rows(run.folder) if "validation" in r]
    assert found[:2] == [None, None] and found[2] == pytest.approx(run.state.best)  # JSON has no infinity


def test_gradients_are_clipped_unless_the_norm_is_zero(tmp_path):
    found = {}
    for limit in (0.0, 1e-3, 1e3):
        run = trainer(tmp_path / "run", max_grad_norm=limit)
        run.update()
        reported = run.read_metrics()["grad_norm"]
        found[limit] = float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm())
        assert reported == pytest.approx(found[0.0], rel=1e-5)  # what is told is the norm before
    assert found[0.0] > 0.01
    assert found[1e3] == pytest.approx(found[0.0], rel=1e-5) and found[1e-3] == pytest.approx(1e-3, rel=1e-2)


# -- averaging, schedule, batches --------------------------------------------------------------------------------


def test_learning_rate():
    rates = [learning_rate(i, 2.0, 4, 10, "cosine") for i in range(11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0) and rates[10] == pytest.approx(0.0, abs=1e-15)
    assert [learning_rate(i, 2.0, 0, 10, "constant") for i in (0, 9)] == [2.0, 2.0]
    assert learning_rate(15, 1.0, 2, 10, "cosine") == pytest.approx(0.0, abs=1e-15)  # beyond its end it does not rise again


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.999])
def test_averaged_weights_are_the_exponential_mean(decay):
    model = torch.nn.Linear(2, 1).double()
    averaged = Average(model, decay)
    expected = None
    for n in range(1, 30):
        with torch.no_grad():
            model.weight.normal_(generator=GENERATOR)
        averaged.update_parameters(model)
        now = model.weight.detach().clone()
        d = min(decay, n / (9 + n))  # the update after the first n - 1
        expected = now if expected is None else d * expected + (1 - d) * now
    assert torch.allclose(averaged.module.weight, expected, rtol=0, atol=1e-14)


def test_no_averaging_saves_the_weights_themselves(tmp_path):
    run = trainer(tmp_path / "run", steps=4, ema_decay=0.0)
    run.run()
    assert all(torch.equal(run.state.best_weights[k], v) for k, v in run.model.state_dict().items())


def test_a_learned_end_time_is_not_decayed(tmp_path):
    run = trainer(tmp_path / "run", model=MODEL.change(learn_end_time=True), weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in run.state.optimizer.param_groups for p in g["params"]}
    named = dict(run.model.named_parameters())
    assert {n: decays[id(p)] for n, p in named.items()} == {n: 0.0 if n.endswith("sqrt_end_time") else 0.5 for n in named}


def test_batches_are_epochs_without_repeats_and_functions_of_the_step():
    data = dataclasses.replace(DATA, train=torch.arange(100.0).reshape(50, 2))
    one, other = (Batches(data, 16, 0, torch.device("cpu")) for _ in range(2))
    epochs = [torch.cat([one(step)[0] for step in range(3 * e, 3 * e + 3)]) for e in range(3)]
    for epoch in epochs:
        assert len({tuple(r) for r in epoch.tolist()}) == 48
    assert not torch.equal(epochs[0], epochs[1])
    for step in (8, 0, 5, 4):  # in any order
        assert torch.equal(one(step)[0], other(step)[0])
        assert torch.equal(one(step)[2].draw("e", "normal", (3,)), Noise(0, "train", step).draw("e", "normal", (3,)))
    assert not torch.equal(Batches(data, 16, 1, torch.device("cpu"))(0)[0], one(0)[0])
    assert len(Batches(data, 1000, 0, torch.device("cpu"))(7)[0]) == 50


def test_flips_mirror_half_of_the_images_and_nothing_else():
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=GENERATOR)
    data = dataclasses.replace(DATA, train=images, flip=True, train_context=torch.eye(40))
    x, context, _ = Batches(data, 40, 0, torch.device("cpu"))(1)
    source = images[context.argmax(1)]
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) and not torch.equal(a, b) for a, b in zip(x, source, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(x, source, strict=True)])
    assert bool((mirrored ^ same).all()) and 5 < int(mirrored.sum()) < 35


def test_validation_on_some_items_is_the_mean_over_them(tmp_path):
    x, _, index = validation_rows(DATA, 7, VALIDATION_SEED, torch.device("cpu"))
    assert len(set(index.tolist())) == 7 and torch.equal(x, DATA.validation[index])
    hutchinson = SolverConfig.of(grid_steps=2, divergence="hutchinson")  # whose noise belongs to the item, not to its place
    run = trainer(tmp_path / "run", solver=hutchinson, steps=4, validation_items=7)
    run.run()
    every = evaluate(run.best_model(), DATA.validation, seed=VALIDATION_SEED)
    assert run.state.best == pytest.approx(float(every.per_item[index].mean()), abs=1e-4)  # adaptive steps depend on the batch
    assert run.state.best != pytest.approx(every.mean, abs=1e-3)


# -- the watch ---------------------------------------------------------------------------------------------------


def test_watch_reports_the_error_of_the_grid_and_doubles_it(tmp_path):
    run = trainer(tmp_path / "run", solver_check_tolerance=1e-9, max_grid_steps=10)
    with torch.no_grad():  # a field that two steps do not resolve
        for p in run.model.parameters():
            p.mul_(3)
    x, context, noise = run.batches(0)
    run.model.train()
    found = []
    for steps in (2, 4):
        values = []
        for n in (steps, 2 * steps):
            run.model.blocks[0].solver = FixedGrid("rk4", n)
            values.append(run.model.log_prob(x).double().mean().item())
        found.append(abs(values[1] - values[0]) / 2)  # nats a dimension
    monitor(run).apply()
    assert found[0] > 1e-5
    for steps, error in ((4, found[0]), (8, found[1])):
        row = monitor(run).measure(1, x, context, noise)
        assert row["grid_steps"] == steps == run.model.blocks[0].solver.steps
        assert row["solver_error"] == pytest.approx(error, rel=0.05, abs=1e-6)
    assert monitor(run).measure(1, x, context, noise)["grid_steps"] == 8  # 16 would be above --max-grid-steps
    assert monitor(run).refinements == 2


def test_watch_leaves_a_good_grid_alone_and_tightens_an_adaptive_solver(tmp_path, capsys):
    run = trainer(tmp_path / "run", solver_check_tolerance=10.0)
    assert monitor(run).measure(1, *run.batches(0))["grid_steps"] == 2
    adaptive = SolverConfig.of(train_solver="adaptive", rtol=1e-5, atol=1e-5)
    run = trainer(tmp_path / "other", solver=adaptive, solver_check_tolerance=1e-12, quiet=False)
    rtols = [monitor(run).measure(1, *run.batches(0))["rtol"] for _ in range(4)]
    assert rtols == pytest.approx([1e-6, 1e-7, 1e-7, 1e-7])
    assert run.model.blocks[0].solver.rtol == pytest.approx(1e-7)
    said = capsys.readouterr().err
    assert said.count("not refined any further") == 1 and said.count("above --solver-check-tolerance") == 2


def test_watch_counts_a_failed_solve_as_infinite(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SolverError("not finite")

    monkeypatch.setattr("cnf.losses.density.solver_error", fail)
    run = trainer(tmp_path / "run")
    row = monitor(run).measure(1, *run.batches(0))
    assert row == {"solver_error": math.inf, "grid_steps": 4}


# -- what it tells -----------------------------------------------------------------------------------------------


def test_metrics_and_tensorboard_agree(tmp_path, every_step):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path / "run", steps=4).run()
    trainer(tmp_path / "run", steps=6, resume=True).run()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = {"nll": "train/nll", "kinetic": "train/kinetic", "validation": "validation/nll", "solver_error": "solver/solver_error", "nfe": "solver/nfe"}
    for name, tag in tags.items():
        expected = [(r["step"], r[name]) for r in logged_rows(tmp_path / "run") if name in r]
        assert [e.step for e in events.Scalars(tag)] == [step for step, _ in expected]
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert {tag.partition("/")[0] for tag in events.Tags()["scalars"]} == {"train", "validation", "solver"}
    last = logged_rows(tmp_path / "run")[-1]
    assert last["step"] == 6 and last["nfe"] == 8  # two steps of rk4
    assert last["nll"] <= last["loss"] == pytest.approx(last["nll"] + 0.01 * last["kinetic"], rel=1e-5)


def test_lines_without_a_terminal(tmp_path, capsys):
    trainer(tmp_path / "run", steps=8, quiet=False).run()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(said) == 2
    assert said[0].startswith("step 4/8: validation ") and " nats, NFE " in said[0] and "samples/s, about " in said[0]


def test_the_bar_shows_loss_evaluations_and_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    trainer(tmp_path / "run", steps=8, quiet=False).run()
    said = capsys.readouterr().err
    assert "8/8 [00:0" in said and "<" in said and " nats, NFE 8, " in said and "samples/s, " in said and "best " in said


def test_journal_reads_back_what_json_cannot_say(tmp_path):
    journal, run = RunLogger(tmp_path), trainer(tmp_path / "run")
    journal.setup(run)
    journal.on_start(run)
    for row in ({"step": 1, "validation": math.inf}, {"step": 2, "validation": 1.0}):
        journal.on_row(run, row)
    journal.on_end(run)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "validation": None}
    journal.cut(1)
    assert math.isnan(journal.rows[0]["validation"]) and len(journal.rows) == 1


def test_a_step_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("cnf.training.cost.CostMeter.enough_seconds", 0.0)
    grid = [
        measure(settings(model=FlowConfig.of(hidden=(64,)), solver=SolverConfig.of(grid_steps=16, gradient=gradient)), DATA)[0]
        for gradient in ("direct", "checkpoint")
    ]
    assert grid[0].parameters == sum(p.numel() for p in settings(model=FlowConfig.of(hidden=(64,))).build().parameters())
    assert grid[0].batch == 16 and grid[0].seconds > 0 and grid[0].peak > grid[0].kept
    least = 16 * 4 * 16 * 64 * 4 / 2**20  # tanh's value, in float32, at every one of the grid's evaluations
    assert grid[0].kept > least > 4 * grid[1].kept


def test_export_is_the_best_validation(tmp_path):
    from cnf.runs import write_config

    run = trainer(tmp_path / "run")
    write_config(run.folder, run.info)
    run.run()
    found = evaluate(load(run.folder), DATA.validation, seed=VALIDATION_SEED)
    assert found.mean == pytest.approx(run.state.best, abs=1e-12)
    assert run.state.best == min(r["validation"] for r in logged_rows(run.folder) if "validation" in r)
