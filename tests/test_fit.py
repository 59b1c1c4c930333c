"""cnf.fit: any model, data and loss; resumed after kill -9 to the same bits; saved and loaded."""

import dataclasses
import json
import math
import os
import re
import signal
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import mostly_slow
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import cnf
from cnf.errors import CheckpointError, ConfigError, DataError
from cnf.losses import FlowMatching, Likelihood
from cnf.neural_ode import anode_mlp
from cnf.training.callbacks import Callback, EarlyStopping, WeightAverage
from cnf.training.checkpointer import Checkpointer
from cnf.training.non_finite import NonFinitePolicy
from cnf.training.schedule import masked_step

POINTS = torch.randn(80, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([0.3, 1.0]) + torch.tensor([2.0, 0.0])
LABELS = (POINTS[:, 1] > 0).long()
SHORT = {"steps": 6, "batch_size": 16, "validate_every": 3, "quiet": True}


class Own(nn.Module):
    """A field of a user's own."""

    def __init__(self, dim=2, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, dim))

    def forward(self, t, x):
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


class Attention(nn.Module):
    """A field in which the two coordinates attend to each other."""

    def __init__(self, width=8):
        super().__init__()
        self.into, self.out = nn.Linear(2, width), nn.Linear(width, 1)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, t, x):
        h = self.into(torch.stack([x, t.expand_as(x)], -1))
        return self.out(h + self.attention(h, h, h, need_weights=True)[0]).squeeze(-1)


def own_flow(seed=0, field=Own):
    torch.manual_seed(seed)
    return cnf.Flow(cnf.CNF(field(), solver=cnf.FixedGrid("rk4", 2)), (2,))


def own_loss(model, x, context, noise):
    nll = -model.log_prob(x, context, noise=noise)
    return {"loss": nll + 0.01 * torch.randn(len(x)) * nll, "nll": nll}  # torch's generator is a function of seed and step too


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Deadly(Callback):
    def __init__(self, step):
        self.step = step

    def on_update(self, run, taken):
        if run.state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def long_fit(folder, kill=None, resume=False):
    """A training with a field, loss and optimiser of one's own."""
    torch.set_num_threads(1)
    flow = own_flow()
    adam = torch.optim.NAdam(flow.parameters(), 0.02)
    own = [Checkpointer] if folder is None else []
    return cnf.fit(
        flow, POINTS, validation=0.25, loss=own_loss, optimizer=adam, schedule=torch.optim.lr_scheduler.ExponentialLR(adam, 0.9), steps=12,
        batch_size=16, validate_every=4, log_every=1, folder=folder, resume=resume, quiet=True, callbacks=own + ([Deadly(kill)] if kill else []),
    )  # fmt: skip


def test_killed_and_resumed_equals_never_stopped(tmp_path):
    whole = long_fit(tmp_path / "whole")
    folder = tmp_path / "run"
    for kill in (6, 10):
        child = os.fork()
        if not child:
            try:
                long_fit(folder, kill, resume=kill > 6)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    again = long_fit(folder, resume=True)
    assert torch.equal(weights(whole.flow), weights(again.flow)) and (whole.best, whole.best_step) == (again.best, again.best_step)
    assert logged(whole.folder) == logged(again.folder) and len(again.history) == 12
    loaded = cnf.load(folder, flow=own_flow(1))
    assert torch.equal(weights(loaded), weights(whole.flow)) and loaded.sample(3).shape == (3, 2)
    with pytest.raises(CheckpointError, match=r"holds cnf\.flow\.Flow with .*Own, whose code is not in the folder.*cnf\.load\(folder, flow=my_flow\)"):
        cnf.load(folder)
    with pytest.raises(ConfigError, match="resume=True continues the run"):
        long_fit(folder)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 0.1), lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5),
    lambda p: torch.optim.Adagrad(p, 0.1), lambda p: torch.optim.NAdam(p, 0.1), lambda p: torch.optim.SGD(p, 0.1),
])  # fmt: skip
def test_any_optimiser_leaves_out_what_is_not_finite(make):
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    masked, plain = make(one.parameters()), make(other.parameters())
    for step, good in enumerate([False, True, False, True, True, False, True]):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for model in (one, other):
            model.zero_grad()
            (model(x).square().mean() * (1.0 if good else math.nan)).backward()
        masked_step(masked, torch.tensor(good))
        if good:
            plain.step()
    assert torch.equal(weights(one), weights(other))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        for key, value in plain.state[b].items():
            assert torch.equal(masked.state[a][key], value) if isinstance(value, torch.Tensor) else masked.state[a][key] == value


class Items(Dataset):
    def __len__(self):
        return len(POINTS)

    def __getitem__(self, i):
        return POINTS[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(POINTS)


@pytest.mark.parametrize("data", [
    POINTS.double().numpy(), pd.DataFrame(POINTS.numpy(), columns=["a", "b"]), TensorDataset(POINTS), Items(), DataLoader(Items(), 16, shuffle=True),
    DataLoader(TensorDataset(POINTS), 16),
], ids=["array", "frame", "tensors", "items", "loader", "loader of tensors"])  # fmt: skip
def test_all_kinds_of_data_give_the_same_run(data):
    plain, other = (cnf.fit(own_flow(), d, validation=POINTS[:8], **SHORT) for d in (POINTS, data))
    assert torch.equal(weights(plain.flow), weights(other.flow)) and plain.best == other.best


def test_arrays_of_other_byte_orders_and_with_masks():
    x = POINTS.double().numpy()
    plain = cnf.fit(own_flow(), x, **SHORT)
    for other in (x.astype(">f8"), x.astype(np.longdouble), np.ma.MaskedArray(x)):
        assert torch.equal(weights(plain.flow), weights(cnf.fit(own_flow(), other, **SHORT).flow))
    masked = np.ma.MaskedArray(x, np.arange(len(x))[:, None] == [5, 5])
    with pytest.raises(DataError, match="train has masked values, first in row 5: remove such rows"):
        cnf.fit(own_flow(), masked, **SHORT)


def test_a_stream_trains_in_its_own_order(capsys):
    result = cnf.fit(own_flow(), DataLoader(Stream(), 16), **{**SHORT, "quiet": False})
    assert result.reason == "steps" and result.best == math.inf and result.best_step == 6
    shown = capsys.readouterr()
    assert re.search(r"step 6/6: no validation data, \d+\.\d{4} nats", shown.out + shown.err) and "inf" not in shown.out + shown.err


def test_a_condition_by_name_and_columns_that_are_no_numbers():
    frame = pd.DataFrame({"x": POINTS[:, 0], "y": POINTS[:, 1], "c": LABELS, "city": ["Rome"] * 80})
    torch.manual_seed(0)
    flow = cnf.build(cnf.FlowConfig.of(hidden=(8,)), cnf.SolverConfig.of(grid_steps=2), (2,), context_dim=1)
    with pytest.raises(DataError, match=r"column 'city' of train has type .*: leave it out"):
        cnf.fit(flow, frame, context="c", **SHORT)
    result = cnf.fit(flow, frame.drop(columns="city"), context="c", validation=0.2, **SHORT)
    assert result.unit == "nats" and math.isfinite(result.best)
    torch.manual_seed(0)
    flow = cnf.build(cnf.FlowConfig.of(hidden=(8,)), cnf.SolverConfig.of(grid_steps=2), (2,), context_dim=1)
    assert cnf.fit(flow, (POINTS, LABELS[:, None]), validation=0.2, **SHORT).best == result.best
    with pytest.raises(DataError, match="the flow is conditional"):
        cnf.fit(flow, POINTS, **SHORT)
    with pytest.raises(DataError, match="context names 'z'"):
        cnf.fit(flow, frame, context="z", **SHORT)


def test_a_predictor_a_module_and_what_has_no_loss():
    torch.manual_seed(0)
    result = cnf.fit(anode_mlp(2, outputs=2, augment=1), POINTS, context=LABELS, validation=0.25, **SHORT)
    assert result.unit == "nats" and "validation_accuracy" in result.history[-1]
    assert cnf.fit(anode_mlp(2, outputs=1), POINTS, context=POINTS[:, :1], **SHORT).unit == "squared error"
    module = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    loss = lambda model, x, y, noise: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    before = torch.get_rng_state()
    result = cnf.fit(module, POINTS, context=LABELS, validation=0.25, loss=loss, schedule=lambda step: 1.0, lr=0.05, **(SHORT | {"steps": 60}))
    assert result.best < 0.6 and not result.flow.training and torch.equal(before, torch.get_rng_state())
    with pytest.raises(ConfigError, match=r"loss=None is for a cnf\.Flow or a predictor, got Sequential"):
        cnf.fit(module, POINTS, **SHORT)
    with pytest.raises(ConfigError, match="loss returned float"):
        cnf.fit(module, POINTS, loss=lambda *a: 1.0, **SHORT)
    with pytest.raises(ConfigError, match="LBFGS"):
        cnf.fit(module, POINTS, loss=loss, optimizer=torch.optim.LBFGS, **SHORT)


def test_objectives_of_the_package():
    torch.manual_seed(0)
    flow = cnf.build(cnf.FlowConfig.of(hidden=(8,), zero_init=False), cnf.SolverConfig.of(grid_steps=2), (2,))
    assert "kinetic" in cnf.fit(flow, POINTS, loss=Likelihood(flow, kinetic=0.01), **SHORT).history[-1]
    assert cnf.fit(flow, POINTS, loss=FlowMatching(flow), validation=0.1, **SHORT).history[-1]["nfe"] == 1
    with pytest.raises(ConfigError, match="of another model"):
        cnf.fit(own_flow(), POINTS, loss=Likelihood(flow), **SHORT)


def test_callbacks_are_left_out_replaced_and_added(tmp_path):
    class Count(Callback):
        steps = 0

        def on_step(self, run):
            self.steps += 1
            return {"counted": self.steps} if run.due else None

        def stop_reason(self, run):
            return "enough" if self.steps == 4 else None

    count = Count()
    policy = NonFinitePolicy(max_skips=1)
    result = cnf.fit(own_flow(), POINTS, callbacks=[count, policy, EarlyStopping(3), WeightAverage], folder=tmp_path / "run", **SHORT)
    assert result.reason == "enough" and result.history[0]["counted"] == 3
    state = torch.load(tmp_path / "run" / "trainer.pt", weights_only=True)
    assert {"Count", "NonFinitePolicy", "SolverMonitor"} <= state["callbacks"].keys() and "WeightAverage" not in state["callbacks"]
    bare = cnf.fit(own_flow(), POINTS, callbacks=None, **SHORT)
    assert bare.reason == "steps" and [row["step"] for row in bare.history] == [3, 6]


def table_of_runs(capsys, folder, *names):
    """Return what cnf compare prints of runs, and its table."""
    from cnf.cli import main

    capsys.readouterr()
    assert main(["compare", *(str(folder / name) for name in names), "--out", str(folder / "table.csv")]) == 0
    return capsys.readouterr().out, pd.read_csv(folder / "table.csv")


def test_a_run_of_fit_has_a_row_in_a_table_of_runs(tmp_path, capsys):
    """Its figure is the mean of -log p over the test rows, of which training sees none."""
    test = POINTS.flip(0) + 0.1
    result = cnf.fit(own_flow(), POINTS, validation=0.25, test=test, folder=tmp_path / "own", **SHORT)
    with torch.no_grad():
        nll = -result.flow.log_prob(test).double()
    assert result.figure["value"] == pytest.approx(float(nll.mean()), abs=2e-3)
    assert result.figure["standard_error"] == pytest.approx(float(nll.std()) / len(test) ** 0.5, rel=1e-2)
    kept = json.loads((tmp_path / "own" / "result.json").read_text())
    assert (kept["value"], kept["split"], kept["items"], kept["validation"]) == (result.figure["value"], "test", 80, result.best)
    unseen = cnf.fit(own_flow(), POINTS, validation=0.25, **SHORT)
    assert torch.equal(weights(unseen.flow), weights(result.flow)) and unseen.figure is None
    held = cnf.fit(own_flow(), POINTS, validation=0.25, folder=tmp_path / "held", **SHORT)
    assert held.figure["split"] == "validation" and held.figure["value"] == pytest.approx(held.best, abs=2e-3)
    said, rows = table_of_runs(capsys, tmp_path, "own", "held")
    assert list(rows["split"]) == ["test", "validation"] and "not comparable as they stand: split is test, validation" in said
    assert re.search("data is arrays [0-9a-f]{8}, arrays [0-9a-f]{8}", said)  # other rows


@pytest.mark.slow
def test_a_run_of_fit_compares_with_a_run_of_a_preset(tmp_path, capsys):
    from cnf.cli import main
    from cnf.config.results import COMPARABLE

    data = cnf.data.load("2spirals", sizes=(64, 20, 30))
    cnf.fit(own_flow(), data, folder=tmp_path / "spirals", **SHORT)
    assert main(["train", "ffjord-toy", "--steps", "1", "--batch-size", "8", "--toy-sizes", "64", "20", "30", "--data", "2spirals", "--out", str(tmp_path / "run")]) == 0
    said, rows = table_of_runs(capsys, tmp_path, "spirals", "run")
    assert "not comparable" not in said and "split" not in rows and list(rows["data"]) == ["2spirals"] * 2 and list(rows["rows"]) == [30, 30]
    kept = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("spirals", "run")]
    assert all(kept[0][name] == kept[1][name] for name in COMPARABLE) and kept[0]["integral"] == pytest.approx(1, abs=0.05)
    assert list(rows["value"]) == [pytest.approx(each["value"], abs=1e-4) for each in kept]


def test_predictors_of_fit_have_a_figure_and_other_models_none(tmp_path, capsys):
    torch.manual_seed(0)
    model = anode_mlp(2, hidden=8, outputs=2, augment=1)
    result = cnf.fit(model, (POINTS, LABELS), validation=0.25, test=(POINTS, LABELS), folder=tmp_path / "run", **SHORT)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(result.flow(POINTS), LABELS)
    assert result.figure["metric"] == "cross_entropy" and result.figure["value"] == pytest.approx(float(loss), abs=1e-3)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] == result.figure["accuracy"]
    with pytest.raises(ConfigError, match="test= scores a flow, or a predictor by its own loss, got Linear with a custom loss: leave test out"):
        cnf.fit(nn.Linear(2, 1), POINTS, test=POINTS, loss=lambda model, x, context, noise: model(x).square().mean(1), **SHORT)
    with pytest.raises(ConfigError, match=r"test=0\.2 must be rows"):
        cnf.fit(own_flow(), POINTS, test=0.2, **SHORT)
    data = cnf.data.load("2spirals", sizes=(64, 20, 30))
    with pytest.raises(ConfigError, match="validation is part of the data set '2spirals'"):
        cnf.fit(own_flow(), data, validation=0.2, **SHORT)
    with pytest.raises(DataError, match="'digits' has levels=17, but the model has levels=256"):
        cnf.fit(cnf.build(cnf.FlowConfig.of(field="conv", hidden=(4,)), cnf.SolverConfig(), (1, 8, 8), levels=256), cnf.data.load("digits"), **SHORT)
    from cnf.solvers import Stats
    from cnf.transforms import Transform, TransformOutput

    class Scale(Transform):
        """A transform without an inverse."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(2))

        def forward(self, x, request):
            return TransformOutput(x * self.scale.exp(), self.scale.sum().expand(len(x)), {}, Stats())

    scaled = cnf.fit(cnf.Flow(Scale(), (2,)), POINTS, validation=0.25, folder=tmp_path / "scale", **SHORT)
    assert scaled.figure["value"] == pytest.approx(scaled.best, abs=1e-6)
    assert json.loads((tmp_path / "scale" / "result.json").read_text())["round_trip_error"] is None
    Scale.inverse = lambda self, z, request: {}["inverse"]  # a mistake that the training does not meet
    faulty = cnf.fit(cnf.Flow(Scale(), (2,)), POINTS, validation=0.25, folder=tmp_path / "faulty", **{**SHORT, "quiet": False})
    assert faulty.best == scaled.best and faulty.figure is None and "cannot be scored, so that the run has no figure" in "".join(capsys.readouterr())
    shifted = cnf.fit(own_flow(), POINTS, validation=0.25, test=POINTS, loss=own_loss, folder=tmp_path / "loss", **SHORT)
    assert shifted.figure["validation"] is None and shifted.figure["metric"] == "nats"  # the validation is of another loss


@pytest.mark.parametrize("lacking", mostly_slow(["validation", "test"], "validation"))
def test_a_data_set_without_validation_or_test_rows(tmp_path, lacking):
    data = cnf.data.load("2spirals", sizes=(64, 20, 30))
    part = dataclasses.replace(data, kind="table" if lacking == "validation" else "toy", **{lacking: data.test[:0]})
    figure = cnf.fit(own_flow(), part, folder=tmp_path / "run", **SHORT).figure
    assert figure["split"] == {"validation": "test", "test": "validation"}[lacking]
    text = (tmp_path / "run" / "report.html").read_text()
    if lacking == "validation":  # the last weights are no best ones
        assert figure["best_step"] is None and "without validation" in text and "the best" not in text
    else:
        assert figure["integral"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("made", "train", "test", "message"),
    [
        (lambda: own_flow(), POINTS, POINTS / 0, "test holds NaN or infinity, first in row 0"),
        (lambda: own_flow(), POINTS, POINTS[:0], "test has no rows"),
        (lambda: cnf.build(cnf.FlowConfig.of(hidden=(8,)), cnf.SolverConfig(), (2,), context_dim=1), (POINTS, POINTS[:, :1]), (POINTS, POINTS), r"context has shape .*, expected \(1,\)"),
        (lambda: anode_mlp(2, hidden=8, outputs=2, augment=1), (POINTS, LABELS), POINTS, "test has no targets"),
    ],
    ids=["NaN", "empty", "context", "targets"],
)
def test_test_rows_that_cannot_be_scored_are_refused_before_the_training(made, train, test, message):
    model = made()
    before = weights(model).clone()
    with pytest.raises(DataError, match=message):
        cnf.fit(model, train, test=test, **SHORT)
    assert torch.equal(weights(model), before)


def test_attention_on_moons_in_ten_lines(tmp_path):
    from sklearn.datasets import make_moons

    x, _ = make_moons(200, noise=0.05, random_state=0)
    torch.manual_seed(0)
    solver = cnf.FixedGrid("rk4", 2)
    flow = cnf.Flow(cnf.CNF(Attention(), cnf.Hutchinson(mode="reverse"), solver), (2,))
    result = cnf.fit(flow, x, validation=0.2, steps=40, batch_size=64, validate_every=20, lr=0.02, quiet=True, folder=tmp_path / "run")
    first, last = (row["validation"] for row in result.history if "validation" in row)
    assert last < first < 10
    assert np.isfinite(cnf.load(tmp_path / "run", flow=cnf.Flow(cnf.CNF(Attention()), (2,))).sample(5).numpy()).all()


def test_what_was_built_is_saved_with_its_settings(tmp_path):
    torch.manual_seed(0)
    flow = cnf.build(cnf.FlowConfig.of(hidden=(8,)), cnf.SolverConfig.of(grid_steps=2), (2,))
    result = cnf.fit(flow, POINTS, folder=tmp_path / "run", **SHORT)
    assert torch.equal(weights(cnf.load(tmp_path / "run")), weights(result.flow))
    cnf.save(flow, tmp_path / "saved")
    torch.testing.assert_close(cnf.load(tmp_path / "saved").log_prob(POINTS), flow.log_prob(POINTS))
    cnf.save(own_flow(), tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"flow= is torch\.nn.*holds cnf\.flow\.Flow"):
        cnf.load(tmp_path / "own", flow=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="does not hold this model's weights"):
        cnf.load(tmp_path / "own", flow=cnf.Flow(cnf.CNF(Own(2, 9)), (2,)))
    from cnf.runs import read_config

    with pytest.raises(CheckpointError, match="not a run of cnf train: load it in Python"):
        read_config(tmp_path / "own")


def test_a_field_of_ones_own_on_the_command_line(tmp_path, monkeypatch, capsys):
    from cnf.cli import sample_main, train_main


    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    code = (
        "import torch\n\nclass Own(torch.nn.Module):\n    def __init__(self, dim):\n        super().__init__()\n"
        "        self.net = torch.nn.Linear(dim + 1, dim)\n\n    def forward(self, t, x):\n"
        "        return self.net(torch.cat([x, t.expand(len(x), 1)], 1)).tanh()\n"
    )
    (tmp_path / "own.py").write_text(code)
    field, out = ["--field", f"{tmp_path / 'own.py'}:Own"], str(tmp_path / "run")
    small = ["--data", "moons", "--toy-sizes", "60", "20", "20", "--batch-size", "16", "--validate-every", "3", "--out", out]
    assert train_main(["ffjord-toy", *small, "--steps", "4", *field]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["custom_field"] == "Own"
    assert train_main(["--resume", "--out", out, "--steps", "6", *field]) == 0
    assert train_main(["--evaluate", out, f"{field[0]}={field[1]}"]) == 0
    assert sample_main([out, "-n", "5", *field]) == 0
    assert "has changed" not in capsys.readouterr().err
    (tmp_path / "own.py").write_text(code.replace(".tanh()", ".sin()"))  # another density with the same weights
    for words, program in ((["--evaluate", out], train_main), ([out, "-n", "5"], sample_main), (["--resume", "--out", out, "--steps", "7"], train_main)):
        assert program([*words, *field]) == 0
        assert f"the file of the field Own has changed since {out} was trained" in capsys.readouterr().err
    (tmp_path / "own.py").write_text(code)
    for run in (lambda: train_main(["--evaluate", out]), lambda: train_main(["--resume", "--out", out]), lambda: sample_main([out, "-n", "5"])):
        assert run() != 0
        assert "trained with a field of your own, Own: give --field FILE.py:Own again" in capsys.readouterr().err
    (tmp_path / "own.py").write_text(code + "\ndef three(dim):\n    return 3\n\nclass Wide(Own):\n    def __init__(self, dim, width):\n        pass\n")
    for name, message in (("three", "field three makes a int; expected an nn.Module"), ("Wide", "cannot be made (missing a required argument: 'width')")):
        assert train_main(["ffjord-toy", *small[:-1], f"{out}-{name}", "--steps", "4", "--field", f"{tmp_path / 'own.py'}:{name}"]) == 2
        assert message in capsys.readouterr().err
    assert train_main(["ffjord-toy", "--field", "nowhere.py:Own"]) == 2
    assert "there is no file nowhere.py" in capsys.readouterr().err


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.RMSprop(p, 0.1), lambda p: torch.optim.Adam(p, 0.1),
])  # fmt: skip
def test_a_masked_step_reads_nothing_once_the_optimiser_has_its_state(make):
    from test_hostfree import WAITING
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        found = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # Adam's own step counters are read on a CPU, by torch
            if any(part in str(function) for part in WAITING) and args[0].dtype == torch.bool:
                self.found = (*self.found, str(function))
            return function(*args, **(kwargs or {}))

    model = nn.Linear(3, 2)
    optimizer, taken = make(model.parameters()), torch.tensor(True)
    model(torch.ones(1, 3)).sum().backward()
    with Reads() as first:
        masked_step(optimizer, taken)
    with Reads() as later:
        masked_step(optimizer, taken)
    assert first.found and not later.found


WRONG = {
    "steps must be an integer, got 2.5": {"steps": 2.5},
    "batch_size must be at least 1, got 0": {"batch_size": 0},
    "precision must be one of float32": {"precision": "fp16"},
    "device='nowhere' cannot be used": {"device": "nowhere"},
    "optimizer must be a torch.optim.Optimizer or a function": {"optimizer": "adam"},
    "callbacks must be cnf.training.Callback objects or classes, got 'patience'": {"callbacks": ["patience"]},
    "loss does not depend on the parameters": {"loss": lambda model, x, context, noise: x.square().sum(1)},
    "validation=1.5 of 80 rows": {"validation": 1.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        cnf.fit(own_flow(), POINTS, **{**SHORT, **WRONG[message]})


def test_a_model_without_parameters_and_one_callback_alone():
    class Decay(nn.Module):
        def forward(self, t, x):
            return -x

    with pytest.raises(ConfigError, match="Flow has no parameter that requires a gradient"):
        cnf.fit(cnf.Flow(cnf.CNF(Decay()), (2,)), POINTS, **SHORT)
    assert cnf.fit(own_flow(), POINTS, callbacks=cnf.training.TimeLimit(0.0), **SHORT).reason == "max_time"


def test_data_without_density_are_told():
    flow, x = cnf.Flow(cnf.CNF(cnf.fields.MLP(3, (4,))), (3,)), torch.randn(60, 3)
    for column, words in (
        (torch.ones(60), "column 2 is constant at 1"),
        (x[:, 0] - 2 * x[:, 1], "column 2 = column 0 - 2 column 1"),
        ((x[:, 2] > 0).float(), "column 2 has 2 distinct values in 60 rows"),
        (torch.arange(60.0) // 3, "column 2 has 20 distinct values in 60 rows"),
        (x[:, 2].clamp(min=0), r"column 2 is 0 in \d\d% of the rows"),
    ):
        with pytest.warns(UserWarning, match=f"have no density.*{words}"):
            cnf.fit(flow, torch.cat([x[:, :2], column[:, None]], 1), steps=1, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cnf.fit(flow, x, steps=1, quiet=True)


def test_losses_and_transforms_of_another_kind_are_named():
    flow = cnf.Flow(cnf.CNF(cnf.fields.MLP(2, (4,))), (2,))
    for loss, words in ((torch.nn.MSELoss(), "loss=MSELoss takes"), (lambda flow, x: -flow.log_prob(x), "expected a function of .model, x, context, noise.")):
        with pytest.raises(ConfigError, match=words):
            cnf.fit(flow, torch.randn(9, 2), loss=loss, steps=1, quiet=True)
    for transform in (torch.nn.Linear(2, 2), None, [torch.nn.ReLU()]):
        with pytest.raises(ConfigError, match=r"transform is a .*expected a transform of cnf"):
            cnf.Flow(cnf.transforms.Sequential(transform) if isinstance(transform, list) else transform, (2,))
    with pytest.raises(ConfigError, match="Linear without log_prob"):
        cnf.losses.NegativeLogLikelihood(torch.nn.Linear(2, 2))
