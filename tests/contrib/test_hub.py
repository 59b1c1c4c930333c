"""Models as folders of the hub: written, read back to the same bits, described by a card; nothing is downloaded here."""

import json

import pytest
import torch
from conftest import Malicious, normal

import cnf
from cnf import CNF, Flow
from cnf.contrib.hub import from_pretrained, model_card
from cnf.errors import CheckpointError, ConfigError
from cnf.fields import MLP
from cnf.neural_ode import anode_mlp

RESULT = {
    "metric": "nats", "value": 1.25, "nats": 1.25, "unit": "nats", "standard_error": 0.01, "split": "test", "data": "measurements", "items": 90,
    "items_of": 100, "dequantisation": "none", "divergence": "exact", "probes": None, "probe": None, "solver": "dopri5", "rtol": 1e-5, "atol": 1e-5,
    "grid_steps": None, "solver_error": 1e-4, "checked_items": 90,
}  # fmt: skip


def built(context_dim=0):
    torch.manual_seed(0)
    flow = cnf.build(cnf.FlowConfig.of(hidden=(8,), zero_init=False), cnf.SolverConfig(), (2,), context_dim=context_dim)
    flow.fit_statistics(3 + 2 * normal(50, 2).float())
    return flow.eval()


def test_a_folder_gives_the_same_model(tmp_path):
    flow, x = built(), normal(5, 2).float()
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    flow.save_pretrained(tmp_path / "model", result=tmp_path / "result.json", description="Two measurements.")
    again = cnf.Flow.from_pretrained(tmp_path / "model")
    assert torch.equal(again.log_prob(x), flow.log_prob(x)) and not again.training
    card = (tmp_path / "model/README.md").read_text()
    assert "**1.2500 ± 0.0100 nats** (test)" in card and "exact trace; dopri5 rtol 1e-05" in card and "90 of 100 test items of measurements" in card
    assert "Two measurements." in card and f"parameters: {sum(p.numel() for p in flow.parameters()):,}" in card and card.startswith("---\nlibrary_name: cnf\n")
    flow.save_pretrained(tmp_path / "model")  # again, without a figure
    assert "None is given." in (tmp_path / "model/README.md").read_text()
    assert "context: 3 numbers" in model_card(built(3))


def test_custom_models_and_predictors(tmp_path):
    class Custom(MLP):
        """Code that no folder holds."""

    flow = cnf.Flow(cnf.CNF(Custom(2)), (2,))
    flow.save_pretrained(tmp_path / "custom")
    assert "Custom" in (tmp_path / "custom/README.md").read_text()
    with pytest.raises(CheckpointError, match="whose code is not in the folder"):
        cnf.Flow.from_pretrained(tmp_path / "custom")
    other = cnf.Flow(cnf.CNF(Custom(2)), (2,))
    assert cnf.Flow.from_pretrained(tmp_path / "custom", flow=other) is other
    assert all(torch.equal(a, b) for a, b in zip(flow.state_dict().values(), other.state_dict().values(), strict=True))
    cnf.contrib.hub.save_pretrained(anode_mlp(2, 2, 4, 1), tmp_path / "predictor")
    with pytest.raises(CheckpointError, match="code is not in the folder"):
        from_pretrained(tmp_path / "predictor")


def test_what_is_no_model(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"is no folder; expected one, pretrained:NAME, or a repository"):
        from_pretrained(tmp_path / "nothing" / "at" / "all")
    with pytest.raises(ConfigError, match="push_to='mine' is no repository"):
        built().save_pretrained(tmp_path / "model", push_to="mine")
    trap = tmp_path / "trap"
    built().save_pretrained(tmp_path / "model")
    torch.save({"weights": Malicious(trap)}, tmp_path / "model/model.safetensors")
    with pytest.raises(CheckpointError):
        cnf.Flow.from_pretrained(tmp_path / "model")
    assert not trap.exists()


def test_the_packaged_model_has_a_card():
    assert cnf.Flow.from_pretrained("pretrained:fm-mnist").event_shape == (1, 28, 28)
    card = (cnf.runs.located("pretrained:fm-mnist") / "README.md").read_text()
    assert "0.9688 ± 0.0080 bits/dim" in card and "truncated-normal dequantisation" in card and "1,113,124" in card


def test_a_repository_is_downloaded_without_code(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    flow = built()
    flow.save_pretrained(tmp_path / "model")
    assert hub.ModelCard.load(tmp_path / "model/README.md").data.library_name == "cnf"
    asked = []

    def download(repo, **options):
        asked.append((repo, sorted(options["allow_patterns"]), options["revision"]))
        if repo == "a/missing":
            raise hub.errors.LocalEntryNotFoundError("no network")
        return str(tmp_path / "model")

    monkeypatch.setattr(hub, "snapshot_download", download)
    again = cnf.Flow.from_pretrained("someone/moons", revision="v1")
    assert asked == [("someone/moons", ["README.md", "config.json", "model.safetensors"], "v1")]
    assert torch.equal(again.like, flow.like)
    with pytest.raises(CheckpointError, match="a/missing is no folder here, and cannot be downloaded from the hub: no network"):
        cnf.Flow.from_pretrained("a/missing")
    sent = []
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, repo, **options: sent.append(repo))
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda self, **options: sent.append(options["folder_path"]))
    flow.save_pretrained(tmp_path / "model", push_to="someone/moons")
    assert sent == ["someone/moons", str(tmp_path / "model")]
    assert 'cnf.Flow.from_pretrained("someone/moons")' in (tmp_path / "model/README.md").read_text()


def test_another_model_with_the_same_weights_is_not_loaded(tmp_path):
    x = torch.randn(5, 2)

    def flow(nonlinearity="tanh", end_time=1.0, base_std=1.0):
        torch.manual_seed(0)
        made = Flow(CNF(MLP(2, (8,), nonlinearity=nonlinearity, zero_init=False), end_time=end_time), (2,), base_std=base_std)
        return made.eval()

    saved = flow()
    cnf.save(saved, tmp_path)
    torch.testing.assert_close(cnf.load(tmp_path, flow=flow()).log_prob(x), saved.log_prob(x))
    for options in ({"nonlinearity": "softplus"}, {"end_time": 2.0}, {"base_std": 2.0}):
        with pytest.raises(CheckpointError, match="computes something else with these weights than the one that was saved"):
            cnf.load(tmp_path, flow=flow(**options))


@pytest.mark.parametrize("change", [lambda block: setattr(block, "fixed_end_time", 2.0), lambda block: block.field.register_forward_hook(lambda m, i, out: 2 * out)], ids=["end time", "hook"])
def test_a_built_model_that_was_changed_is_not_built_again_without_the_change(tmp_path, change):
    flow = cnf.build(cnf.FlowConfig.of(hidden=(8,)), cnf.SolverConfig.of(grid_steps=2), (2,))
    change(flow.blocks[0])
    flow.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a flow composed by hand"):
        Flow.from_pretrained(tmp_path)
