"""Training by flow matching, and by matching and then the likelihood: stages, resuming, a grid that is gamed."""

import os
import signal

import pytest
import torch
import trainers
from conftest import logged_rows, mostly_slow
from trainers import monitor, policy, training

from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.errors import ConfigError, SolverError
from cnf.evaluation import evaluate
from cnf.losses import FlowMatching, Likelihood
from cnf.random import Noise
from cnf.runs import RunInfo, load, write_config
from cnf.solvers import FixedGrid
from cnf.training import Interrupted, Trainer, finish
from cnf.training.batches import Batches
from cnf.training.time_sampler import TimeSampler

GENERATOR = torch.Generator().manual_seed(3)
POINTS = torch.randn(600, 2, generator=GENERATOR) @ torch.tensor([[0.4, 0.3], [0.0, 1.0]]) + torch.tensor([2.0, 0.0])
DATA = DataSplits("points", "table", POINTS[:400], POINTS[400:500], POINTS[500:])
MODEL = FlowConfig.of(hidden=(16,), zero_init=False)
BOTH = {"objective": "both", "steps": 12, "finetune_steps": 5, "finetune_batch_size": 24, "finetune_lr": 1e-3}


def trainer(folder, *, model=MODEL, solver=None, data=DATA, resume=False, quiet=True, **train):
    train = {"steps": 12, "batch_size": 16, "warmup": 3, "lr": 0.01, "validate_every": 4, "solver_check_every": 3} | train
    config = RunConfig("points", DataConfig(), model, solver or SolverConfig.of(grid_steps=2), TrainConfig.of(**train))
    folder.mkdir(exist_ok=True)
    return training(RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns), data, folder, resume=resume, quiet=quiet)


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setitem(trainers.RUN, "log_every", 1)


@pytest.mark.slow
def test_matching_learns_a_density_with_one_evaluation_an_item(tmp_path, every_step):
    run = trainer(tmp_path / "run", objective="flow-matching", steps=600, batch_size=128, validate_every=300, solver_check_every=50,
                  model=MODEL.change(hidden=(32, 32)))  # fmt: skip
    assert isinstance(run.objective, FlowMatching) and not run.objective.solves
    write_config(run.folder, run.info)
    before = run.validate()["validation"]
    run.run()
    found = logged_rows(run.folder)
    assert {row["nfe"] for row in found} == {1} and {row["nfe_backward"] for row in found} == {0}
    truth = torch.distributions.MultivariateNormal(POINTS.mean(0), POINTS.T.cov())
    best = -float(truth.log_prob(DATA.validation).mean())
    assert before > best + 0.1 and best - 0.05 < run.state.best < best + 0.05
    assert 0 < found[-1]["straightness"] <= 1 and found[-1]["path_energy"] > 0 and found[-1]["validation_nfe"] > 10
    learned = [row["early_times"] for row in found if "early_times" in row]
    assert learned and all(0 < value < 1 for value in learned)
    flow = load(run.folder)
    assert evaluate(flow, DATA.validation).mean == pytest.approx(run.state.best, abs=1e-5)


@pytest.mark.parametrize("objective", ["flow-matching", "both"])
def test_curves_have_the_evaluations_of_solves_only(tmp_path, monkeypatch, every_step, objective):
    run = trainer(tmp_path / "run", **(BOTH | {"objective": objective} if objective == "both" else {"objective": objective}))
    run.run()
    given = []
    monkeypatch.setattr("cnf.training.report.pictures", lambda flow, data, folder, metrics, unit: given.extend(metrics))
    finish(run, run.info, run.data, run.folder)
    tuned = [8, 9, 10, 11, 12] if objective == "both" else []  # the steps that solve, on a grid of rk4
    assert [row["step"] for row in given if "nfe" in row] == tuned and all(row["nfe"] >= 8 for row in given if row["step"] in tuned)
    validated = [row for row in given if "validation" in row]
    assert len(validated) >= 3 and all(row["validation_nfe"] > 10 for row in validated)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["independent", "optimal-transport"])
def test_matching_learns_a_density_for_each_class(tmp_path, coupling):
    generator = torch.Generator().manual_seed(5)
    code = torch.arange(900) % 2
    middle, spread = torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.4, 0.8], [0.8, 0.4]])
    x, context = middle[code] + spread[code] * torch.randn(900, 2, generator=generator), torch.eye(2)[code]
    cut = slice(0, 600), slice(600, 750), slice(750, 900)
    data = DataSplits("two", "table", *(x[c] for c in cut), *(context[c] for c in cut), classes=("left", "right"))
    run = trainer(
        tmp_path / "run", objective="flow-matching", coupling=coupling, steps=500, batch_size=100, validate_every=250, data=data,
        model=MODEL.change(hidden=(32, 32)),
    )  # fmt: skip
    run.run()
    flow = run.best_model()
    truth = torch.distributions.Normal(middle[code[cut[1]]], spread[code[cut[1]]]).log_prob(data.validation).sum(1)
    found = flow.log_prob(data.validation, data.validation_context).detach()
    assert abs(float((found - truth).mean())) < 0.1
    assert float((flow.log_prob(data.validation, data.validation_context.flip(1)).detach() - truth).mean()) < -3  # the other class's density
    drawn = flow.sample(200, torch.eye(2), noise=Noise(0))
    assert torch.allclose(drawn.mean(0), middle, atol=0.2)


def test_both_begins_with_matching_and_ends_with_the_likelihood(tmp_path, every_step, capsys):
    run = trainer(tmp_path / "run", quiet=False, kinetic=0.01, **BOTH)
    seen = []
    real = Trainer.update

    def update(self):
        real(self)
        seen.append((type(self.objective), self.batches.size, self.state.optimizer.param_groups[0]["lr"]))

    run.update = update.__get__(run)
    run.run()
    assert seen[:7] == [(FlowMatching, 16, pytest.approx(rate)) for rate in [s[2] for s in seen[:7]]]
    assert [(kind, size) for kind, size, _ in seen[7:]] == [(Likelihood, 24)] * 5
    assert seen[2][2] == pytest.approx(0.01) and seen[6][2] < 0.003  # a cosine of its own for each stage
    assert seen[7][2] == pytest.approx(1e-3) and seen[11][2] < 2e-4
    found = logged_rows(run.folder)
    assert "nll" not in found[6] and {"nll", "kinetic"} <= found[7].keys()
    assert [row["nfe"] for row in found] == [1] * 7 + [8] * 5
    assert [row["step"] for row in found if "validation" in row] == [4, 7, 8, 12]  # 7: the end of matching
    assert "step 7: from here on the likelihood, on batches of 24" in capsys.readouterr().err


def test_the_fine_tuning_begins_with_the_averaged_weights(tmp_path):
    run = trainer(tmp_path / "run", ema_decay=0.9, **BOTH)
    while run.state.step < 7:
        run.update()
        run.state.step += 1
    averaged = {k: v.clone() for k, v in run.averaged().state_dict().items()}
    optimizer = run.state.optimizer
    run.start_phase()
    assert run.state.phase == 1 and run.state.since == 7 and run.state.optimizer is not optimizer and not run.state.optimizer.state
    assert all(torch.equal(v, averaged[k]) for k, v in run.model.state_dict().items())
    assert policy(run).good_step == 7 and torch.equal(policy(run).good["model"]["transform.transforms.0.mean"], averaged["transform.transforms.0.mean"])


@pytest.mark.parametrize("stop", mostly_slow([3, 6, 7, 9], 3, 7))  # matching, before and after the change, likelihood
def test_interrupted_and_resumed_equals_never_stopped(tmp_path, monkeypatch, every_step, stop):
    options = {**BOTH, "kinetic": 0.01, "solver_check_tolerance": 1e-6, "solver": SolverConfig.of(grid_steps=1, automatic_steps=True)}
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    with monkeypatch.context() as patch:
        real = Trainer.update

        def update(self):
            if self.state.step == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self)

        patch.setattr(Trainer, "update", update)
        first = trainer(tmp_path / "parts", **options)
        with pytest.raises(Interrupted):
            first.run()
    second = trainer(tmp_path / "parts", resume=True, **options)
    assert second.state.step == stop + 1 and second.state.phase == (stop >= 7)
    second.run()
    for part in ("model", "average"):
        one, other = (run.snapshot()[part] for run in (whole, second))
        assert all(torch.equal(one[k], other[k]) for k in one), part
    assert all(torch.equal(whole.state.best_weights[k], second.state.best_weights[k]) for k in whole.state.best_weights)
    assert logged_rows(whole.folder) == logged_rows(second.folder)
    assert whole.model.blocks[0].solver.steps == second.model.blocks[0].solver.steps > 1


def test_more_steps_go_on_with_the_likelihood_once_it_has_begun(tmp_path):
    trainer(tmp_path / "run", **BOTH).run()
    longer = trainer(tmp_path / "run", resume=True, **{**BOTH, "steps": 16})
    longer.run()
    assert (longer.state.step, longer.state.phase, longer.state.since) == (16, 1, 7)


def test_the_times_that_were_learned_are_resumed(tmp_path):
    options = {"objective": "flow-matching", "solver_check_every": 2, "steps": 40}
    run = trainer(tmp_path / "run", **options)
    run.run()
    square = run.objective.times.square
    assert bool(square.isfinite().any())
    again = trainer(tmp_path / "run", resume=True, **options)
    assert torch.equal(again.objective.times.square, square)


def test_a_gamed_grid_is_caught_and_the_weights_go_back(tmp_path, monkeypatch, capsys):
    """One coarse step at a high rate without a regulariser: the grid's likelihood leaves the flow's, which the watch sees."""
    model = MODEL.change(hidden=(32, 32))
    options = {"objective": "both", "steps": 260, "finetune_steps": 60, "finetune_lr": 0.2, "batch_size": 128, "validate_every": 100,
               "solver_check_every": 5, "solver_check_tolerance": 1e-3, "max_grid_steps": 32, "warmup": 0, "max_grad_norm": 0.0}  # fmt: skip
    run = trainer(tmp_path / "run", model=model, quiet=False, solver=SolverConfig.of(method="euler", grid_steps=1), **options)
    monitor(run).settling = 0  # nor was the grid measured before
    run.run()
    said = capsys.readouterr().err
    assert "back to the weights of step 200, with 0.5 times the learning rate" in said
    assert policy(run).rollbacks >= 1
    assert isinstance(run.model.blocks[0].solver, FixedGrid) and run.model.blocks[0].solver.steps > 1
    truth = torch.distributions.MultivariateNormal(POINTS.mean(0), POINTS.T.cov())
    best = -float(truth.log_prob(DATA.validation).mean())
    assert run.state.best < best + 0.15  # the flow that is kept is no worse than what was matched
    final = evaluate(run.averaged().eval(), DATA.validation).mean
    assert final < best + 0.5  # and the weights have recovered


def test_times_that_cannot_be_measured_stay_what_they_are(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", objective="flow-matching")

    def fails(*args, **kwargs):
        raise SolverError("no end")

    sampler = run.callback(TimeSampler)
    assert "early_times" in sampler.on_step(run)
    monkeypatch.setattr(run.objective, "_losses", fails)
    before = run.objective.times.shares
    assert sampler.on_step(run) == {}
    assert torch.equal(run.objective.times.shares, before)


def test_a_bar_goes_on_when_the_objective_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    trainer(tmp_path / "run", quiet=False, **BOTH).run()
    assert "from here on the likelihood" in capsys.readouterr().err


def test_a_grid_is_measured_often_when_the_fine_tuning_begins(tmp_path):
    run = trainer(tmp_path / "run", **{**BOTH, "steps": 1000, "finetune_steps": 100}, solver_check_every=100, solver=SolverConfig.of(automatic_steps=True))
    run.state.step = 900
    run.start_phase()
    assert run.state.phase == 1
    due = []
    for run.state.step in range(901, 1001):
        if monitor(run).on_step(run) is not None:
            due.append(run.state.step)
    assert due[:3] == [905, 910, 915] and len(due) > 12


def test_rows_get_their_times_whatever_their_order(tmp_path):
    """Sorted data, sorted by class, say: no row's time depends on its place."""
    run = trainer(tmp_path / "run", objective="flow-matching", fm_time_sampling="even")
    seen = []
    real = run.objective.path.velocity

    def watched(t, x, context=None, noise=None):
        seen.append(t)
        return real(t, x, context, noise)

    run.objective.path.velocity = watched
    for i in range(200):
        run.objective(DATA.train[:16], noise=Noise(0, step=i))
    times = torch.stack(seen)
    assert torch.allclose(times.mean(0), torch.full((16,), 0.5, dtype=torch.float64), atol=0.12)
    assert torch.allclose(times.sort(1).values.diff(dim=1), torch.full((200, 15), 1 / 16, dtype=torch.float64))


def test_batches_of_another_size_are_of_the_same_data():
    batches = Batches(DATA, 16, 0, torch.device("cpu"))
    other = batches.resized(50)
    assert other.x is batches.x and (batches.size, other.size) == (16, 50)
    order = torch.cat([other(i)[0] for i in range(8)])
    assert len(order.unique(dim=0)) == 400
    assert batches.resized(1000).size == 400


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="whole batch"):
        trainer(tmp_path / "a", objective="flow-matching", coupling="optimal-transport", accumulate=2)
    with pytest.raises(ConfigError, match="end time"):
        trainer(tmp_path / "b", objective="both", finetune_steps=2, model=MODEL.change(learn_end_time=True))
    with pytest.raises(ConfigError, match="coupling='x'; expected one of independent, optimal-transport"):
        trainer(tmp_path / "c", objective="flow-matching", coupling="x")


def test_micro_batches_of_matching_give_the_gradient_of_the_whole_batch(tmp_path):
    found = []
    for count in (1, 3):
        run = trainer(tmp_path / str(count), objective="flow-matching", accumulate=count)
        run.update()
        found.append([p.grad.clone() for p in run.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_matching_is_compiled_and_in_bfloat16_where_that_is_asked_for(tmp_path):
    run = trainer(tmp_path / "run", objective="flow-matching", solver=SolverConfig(precision="bf16"))
    plain = trainer(tmp_path / "plain", objective="flow-matching")
    x, context, _ = plain.batches(0)
    run.model.load_state_dict(plain.model.state_dict())
    one, other = (r.objective(x, context, Noise(0)).mean() for r in (run, plain))
    assert one.dtype == torch.float32 and 0 < abs(float((one - other).detach())) < 0.05 * float(other.detach())
