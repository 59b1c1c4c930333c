"""Settings as tagged unions: by name, nested, from former formats; what does not apply is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import ROOT

import cnf
from cnf.cli.options import parse
from cnf.config import (
    PRESETS,
    AdaptiveConfig,
    AugmentedTimeConfig,
    ConvConfig,
    FlowConfig,
    GeneratingTimeConfig,
    GridConfig,
    HutchinsonConfig,
    MLPConfig,
    NeuralODEConfig,
    ResNetConfig,
    RunConfig,
    SolverConfig,
    TrainConfig,
    UNetConfig,
    preset,
)
from cnf.config.former import NAMES
from cnf.config.tagged import schema, values
from cnf.errors import CheckpointError, ConfigError
from cnf.runs import config_digest, read_config, write_config

FORMER = json.loads((Path(__file__).parent / "data" / "format_4.json").read_text())


def test_by_name_is_nested():
    assert FlowConfig.of(field="conv", hidden=(8,), strides=(1, 1)).field == ConvConfig((8,), strides=(1, 1))
    assert FlowConfig.of(augmented_time="concat", augmented_time_dim=3) == FlowConfig(field=MLPConfig(augmented_time=AugmentedTimeConfig(augmented_time_dim=3)))
    hyper = FlowConfig.of(augmented_time="hyper").field.augmented_time
    assert hyper == GeneratingTimeConfig(kind="hyper") and isinstance(hyper, AugmentedTimeConfig)
    assert SolverConfig.of(train_solver="adaptive", rtol=1e-3).train_solver == AdaptiveConfig(rtol=1e-3)
    assert SolverConfig.of(divergence="hutchinson", probes=3).divergence == HutchinsonConfig(probes=3)


def test_a_changed_family_keeps_what_both_have():
    config = FlowConfig.of(hidden=(9,), nonlinearity="elu", residual="linear")
    conv = config.change(field="conv")
    assert conv.field == ConvConfig((9,), nonlinearity="elu")  # "linear" is for MLPs only
    assert conv.change(field="unet").field == UNetConfig((9,))
    solver = SolverConfig.of(method="euler", grid_steps=7, gradient="checkpoint").change(train_solver="adaptive")
    assert solver.train_solver == AdaptiveConfig()  # neither is an adaptive solver's
    assert SolverConfig.of(method="dopri5").change(train_solver="adaptive").change(train_solver="grid").train_solver == GridConfig(method="dopri5")
    both = TrainConfig.of(kinetic=0.1).change(objective="both", finetune_lr=1e-3).objective
    assert (both.kinetic, both.finetune_lr, both.kind) == (0.1, 1e-3, "both")
    node = RunConfig().change(hidden=(3,)).change(architecture="node").model
    assert isinstance(node, NeuralODEConfig) and node.field.hidden == (3,)


@pytest.mark.parametrize(
    ("kind", "named", "said"),
    [
        (FlowConfig, {"strides": (1,)}, r"strides=\(1,\) is for field='conv', not for field='mlp'"),
        (FlowConfig, {"augmented_time": "concat", "augmented_time_rank": 2}, "is for augmented_time='hyper' or 'both', not for augmented_time='concat'"),
        (FlowConfig, {"field": "unet", "augmented_time": "both"}, "is for field='mlp', 'conv' or 'hypernet', not for field='unet'"),
        (FlowConfig, {"field": "conf"}, "field='conf'; expected one of mlp, conv, unet, hypernet"),
        (FlowConfig, {"hiden": (3,)}, "did you mean 'hidden'"),
        (FlowConfig, {"blocks": 0}, "blocks=0; expected a positive number"),
        (FlowConfig, {"field": "conv", "residual": "linear"}, "residual='linear'; expected one of none, minus"),
        (FlowConfig, {"preprocess": "center", "alpha": 0.1}, "alpha=0.1 is for preprocess='standardize', 'logit' or 'gaussianize'"),
        (NeuralODEConfig, {"depth_terms": 3}, "is for depth='chebyshev', 'fourier' or 'stacked', not for depth='constant'"),
        (ResNetConfig, {"field": "conv"}, "field='conv' is no setting of ResNetConfig"),
        (RunConfig, {"architecture": "resnet", "field": "conv"}, "not for architecture='resnet'"),
        (RunConfig, {"finetune_lr": 1.0}, "is for objective='both', not for objective='likelihood'"),
        (RunConfig, {"grid_steps": 3, "train_solver": "adaptive"}, "is for train_solver='grid'"),
    ],
)
def test_what_does_not_apply_is_refused(kind, named, said):
    with pytest.raises(ConfigError, match=said):
        kind.of(**named)


def test_whole_families_by_name():
    assert FlowConfig.of(field=ConvConfig((8,)), blocks=2) == FlowConfig(field=ConvConfig((8,)), blocks=2)
    assert RunConfig().change(model=ResNetConfig(), lr=0.1) == RunConfig(model=ResNetConfig(), train=TrainConfig(lr=0.1))


def test_a_setting_at_its_default_is_never_refused():
    assert FlowConfig.of(strides=(), unet_depth=2) == FlowConfig()


def test_constructors_name_what_they_expect():
    with pytest.raises(ConfigError, match=r"field='conv'; expected MLPConfig or ConvConfig.*FlowConfig\.of"):
        FlowConfig(field="conv")
    with pytest.raises(ConfigError, match="dequantize='gauss'; expected one of uniform"):
        FlowConfig(dequantize="gauss")


def test_settings_differ_in_name_and_former_names_are_free():
    names = schema((RunConfig,))
    assert not set(NAMES) & set(names) and set(NAMES.values()) <= set(names)
    for entry in PRESETS.values():
        found = [each.name for each in values(entry.config)]
        assert len(found) == len(set(found))
        # so that every preset can be written by name
        assert RunConfig.of(**{each.name: each.value for each in values(entry.config)}) == entry.config


@pytest.mark.parametrize("name", FORMER)
def test_run_folders_of_format_4_are_read(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(FORMER[name]))
    info = read_config(tmp_path)
    config = PRESETS[name].config
    if config.model.field.kind == "unet":  # such runs were evaluated by the adaptive solver, and still are
        config = config.change(likelihood_solver="adaptive")
    assert info.config == config
    write_config(tmp_path, info)
    assert read_config(tmp_path) == info and json.loads((tmp_path / "config.json").read_text())["format"] == 5
    words = ["--config", str(tmp_path / "config.json")]
    assert parse(words)[0].config == info.config
    (tmp_path / "config.json").write_text(json.dumps(FORMER[name]))
    assert parse(words)[0].config == info.config


def test_format_4_is_read_as_strictly(tmp_path):
    def refused(edit, said):
        raw = json.loads(json.dumps(FORMER["fm-digits"]))
        edit(raw["config"])
        raw["sha256"] = config_digest(raw)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=said):
            read_config(tmp_path)

    refused(lambda c: c["model"].update(bogus=1), "unknown field 'bogus'")
    refused(lambda c: c["model"].update(field="mlpp"), "kind is 'mlpp'; expected one of")
    refused(lambda c: c["model"].pop("hidden"), "field 'hidden' is missing")
    refused(lambda c: c["train"].update(draws=1.5), "noise_samples is 1.5; expected int")
    refused(lambda c: c.update(model=[]), r"model is \[\]; expected an object")
    edited = json.loads(json.dumps(FORMER["fm-digits"]))
    edited["config"]["train"]["steps"] = 7
    (tmp_path / "config.json").write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match="checksum differs"):
        read_config(tmp_path)


def test_the_former_constructor_warns():
    with pytest.warns(DeprecationWarning, match="ModelConfig is called"):
        make = cnf.config.ModelConfig
    assert make("multiscale", "conv", (4,), 2, layer="concat", marginals="logit") == FlowConfig.of(
        architecture="multiscale", field="conv", hidden=(4,), blocks=2, time_conditioning="concat", preprocess="logit"
    )
    assert make("resnet", "mlp", (4,), blocks=2, layer="ignore") == ResNetConfig(hidden=(4,), blocks=2)


def config_of(line):
    return parse(line.split())[0].config


def test_options_select_families(capsys):
    assert config_of("digits --field conv --strides 1 1 1").model.field.strides == (1, 1, 1)
    assert config_of("digits --train-solver adaptive").solver.train_solver == AdaptiveConfig()
    # a preset may hold settings of families that it does not choose
    objective = config_of("fm-mnist --objective both").train.objective
    assert objective.finetune_batch_size == 32
    assert config_of("fm-mnist --objective both --finetune-batch-size 8").train.objective.finetune_batch_size == 8
    with pytest.raises(ConfigError, match="--strides 1 is for --field conv, not for --field mlp"):
        config_of("digits --strides 1")
    for wrong, said in (("ffjord-toy --preprocess logit", "--preprocess is for images"), ("digits --preprocess marginals", "is for tables and points")):
        with pytest.raises(ConfigError, match=said):
            config_of(wrong)
    with pytest.raises(ConfigError, match="--grid-steps 3 is for --train-solver grid"):
        config_of("rnode-imagenet64 --grid-steps 3")
    with pytest.raises(ConfigError, match=r"--lr -1\.0: expected a positive number"):
        config_of("digits --lr -1")


@pytest.mark.parametrize("nested", [True, False])
def test_a_file_of_settings_may_be_nested(tmp_path, nested):
    model = {"field": {"kind": "conv", "hidden": [6]}, "blocks": 2} if nested else {"field": "conv", "hidden": [6], "blocks": 2}
    solver = {"train_solver": {"kind": "adaptive", "rtol": 1e-3}} if nested else {"adaptive": True, "rtol": 1e-3}
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"preset": "exact-digits", "model": model, "solver": solver}))
    found, _, _ = parse(["--config", str(path), "--blocks", "3"])
    assert found.config == PRESETS["exact-digits"].config.change(field="conv", hidden=(6,), blocks=3, train_solver="adaptive", rtol=1e-3)


def test_parts_are_frozen_and_compare():
    config = RunConfig().change(lr=0.1)
    assert config == dataclasses.replace(RunConfig(), train=TrainConfig(lr=0.1)) and hash(config) != hash(RunConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0


def test_settings_need_no_torch():
    import subprocess
    import sys

    code = "import sys, cnf; cnf.FlowConfig.of(hidden=(3,)); cnf.SolverConfig(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_with_a_mixture_base_starts_at_the_mixture(tmp_path):
    """A field of zeros: the likelihood before the first step is scikit-learn's mixture's behind the same marginals."""
    torch = pytest.importorskip("torch")
    from sklearn.mixture import GaussianMixture

    from cnf.data import DataSplits
    from cnf.runs import RunInfo
    from cnf.training import from_settings

    x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    x = torch.stack([x[:, 0].exp(), x[:, 0] + x[:, 1] ** 2], 1)
    data = DataSplits("points", "table", x[:400], x[400:500], x[500:])
    model = FlowConfig.of(hidden=(8,), base="mixture", components=3, preprocess="marginals", knots=20)
    config = RunConfig("points", model=model, solver=SolverConfig.of(grid_steps=2), train=TrainConfig.of(steps=3, validate_every=3, batch_size=50))
    info = RunInfo(config, (2,), None, 0, (), ())
    write_config(tmp_path, info)
    assert read_config(tmp_path) == info
    run = from_settings(info, data, tmp_path, quiet=True)
    flow = run.model.eval()
    first = flow.transform.transforms[0]
    z, log_det = first.forward(x)[:2]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    mixture = GaussianMixture(3, random_state=0, max_iter=200).fit(first.forward(x[:400][order]).value.double().numpy())
    truth = torch.from_numpy(mixture.score_samples(z.double().numpy())) + log_det
    with torch.no_grad():
        assert float((flow.log_prob(x).double() - truth).abs().max()) < 1e-3  # float32
    run.run()
    assert run.history[0]["step"] == 0 and run.state.best <= run.history[0]["validation"]
    loaded = cnf.load(tmp_path)
    assert isinstance(loaded.base, cnf.GaussianMixture) and torch.isfinite(loaded.log_prob(x)).all()
    worse = from_settings(dataclasses.replace(info, config=config.change(lr=10.0, warmup=0, max_grad_norm=0.0)), data, tmp_path / "worse", quiet=True)
    worse.run()  # the best validation is that of the start
    assert worse.state.best_step == 0 and worse.state.best == run.history[0]["validation"]
    with pytest.raises(ConfigError, match="preprocess='marginals' is for tables"):
        cnf.build(model, SolverConfig(), (1, 2, 2), levels=4)


@pytest.mark.slow
def test_a_step_size_fixes_the_grid(tmp_path, capsys):
    from cnf.cli import train_main
    from cnf.models.solving import train_solver

    config = preset("rnode-mnist").config.change(step_size=0.25)
    assert train_solver(config.solver).steps == 4 and config.solver.train_solver.steps == 4
    assert train_solver(config.solver.change(step_size=0.3)).steps == 4  # a whole number of equal steps, none longer
    words = ["ffjord-toy", "--step-size", "0.5", "--steps", "3", "--solver-check-every", "1", "--solver-check-tolerance", "1e-9", "--hidden", "4"]
    words += ["--toy-sizes", "40", "20", "20", "--batch-size", "20", "--validate-every", "3", "--warmup", "1", "--out", str(tmp_path / "run")]
    assert train_main(words) == 0
    assert "smaller --step-size" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["grid_steps"] for row in rows if "grid_steps" in row} == {2}
    assert train_main(["ffjord-toy", "--step-size", "0.5", "--grid-steps", "3", "--out", str(tmp_path / "other")]) == 2
    assert "--grid-steps is for grids without --step-size" in capsys.readouterr().err
