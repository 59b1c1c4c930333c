"""The published codes' numeric outputs. Quirks of the released codes live here, in the test, not in the library."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cnf.continuous import CNF
from cnf.divergence import Exact, Hutchinson, linearize
from cnf.fields import MLP, Conv, Linear, time_layer
from cnf.fields.activations import ACTIVATIONS
from cnf.noise import Noise
from cnf.solvers import FixedGrid
from cnf.transforms import CenterShift, Logit, Sequential, Squeeze

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "tests" / "golden"
SHARED = Path(os.environ.get("CNF_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))


def files(prefix):
    found = {p.name: p for folder in (OWN, SHARED) if folder.is_dir() for p in sorted(folder.glob(f"{prefix}*.npz"))}
    return [pytest.param(p, id=name[:-4]) for name, p in sorted(found.items())]


def read(path):
    with np.load(path, allow_pickle=False) as file:
        data = {k: torch.from_numpy(np.asarray(file[k])) for k in file.files if k != "meta"}
        meta = json.loads(str(file["meta"]))
    return {k: v.double() if v.is_floating_point() or v.dtype == torch.int8 else v for k, v in data.items()}, meta


def close(found, expected, tolerance):
    scale = max(1e-300, float(expected.abs().max()))
    error = float((found.detach() - expected).abs().max()) / scale
    assert error < tolerance, f"relative error {error:.2e}"


def put(layer, state, prefix):
    """The reference's parameters of one layer into ours."""
    names = {
        "core.weight": "_layer.weight",
        "core.bias": "_layer.bias",
        "gate.weight": "_hyper_gate.weight",
        "gate.bias": "_hyper_gate.bias",
        "drift.weight": "_hyper_bias.weight",
        "core0.weight": "_layer0.weight",
        "core0.bias": "_layer0.bias",
        "core1.weight": "_layer1.weight",
        "core1.bias": "_layer1.bias",
    }
    own = dict(layer.named_parameters())
    for mine in own:
        name = names.get(mine)
        if name is None:  # hyper: a sequence of linear layers, or one
            rest = mine.split(".", 1)[1]
            found = [k for k in state if k.startswith(f"{prefix}._hypernet") and k.endswith(rest)]
            assert len(found) == 1, (mine, [k for k in state if k.startswith(prefix)])
            value = state[found[0]]
        else:
            if f"{prefix}.{name}" not in state:  # squash has one generator, so the reference does not call it a gate
                name = name.replace("_hyper_gate", "_hyper")
            value = state[f"{prefix}.{name}"]
        own[mine].data = value.clone()
    # the released hyper convolution reads its bias from the start of the weight: our last rows take those values
    if getattr(layer, "time_weights", False) and hasattr(layer, "generator") and layer.map.spatial:
        out = layer.map.outputs
        for p in layer.generator.parameters():
            p.data[-out:] = p.data[:out]


def substate(data, prefix="state/"):
    return {k[len(prefix) :]: v for k, v in data.items() if k.startswith(prefix)}


@pytest.mark.parametrize("path", [*files("h_layers_ffjord"), *files("h_layers_rnode")])
def test_layers(path):
    data, _ = read(path)
    state = substate(data)
    names = sorted({k.rsplit("/", 1)[0] for k in data if k.endswith("/y")})
    checked = 0
    for name in names:
        kind, shape = name.split("_")[0], name.split("_")[1:]
        x, t, y = data[f"{name}/x"], data[f"{name}/t"], data[f"{name}/y"]
        if kind not in ("ignore", "concat", "squash", "concatsquash", "concatcoord", "blend", "hyper"):
            continue
        if x.ndim == 2:
            linear = Linear(x.shape[1], y.shape[1])
        else:
            stride = -2 if "transposed" in name else 2 if "stride2" in name else 0 if "1x1" in name else 1
            linear = Conv.of_stride(x.shape[1], y.shape[1], stride)
        layer = time_layer(kind, linear).double()
        put(layer, state, name)
        x = x.clone().requires_grad_()
        out = layer(t, x)
        close(out, y, 1e-12)
        close(torch.autograd.grad((out * data[f"{name}/e"]).sum(), x)[0], data[f"{name}/vjp"], 1e-12)
        checked += 1
        assert shape
    assert checked >= min(4, len(names))


@pytest.mark.parametrize("path", files("h_transforms"))
def test_transforms(path):
    data, meta = read(path)
    for j in range(meta["config"]["n_squeeze"]):
        assert torch.equal(Squeeze()(data[f"squeeze/{j}/in"].float()).value.long(), data[f"squeeze/{j}/out"].long())
        assert torch.equal(Squeeze().inverse(data[f"unsqueeze/{j}/in"].float()).value.long(), data[f"unsqueeze/{j}/out"].long())
    for j, alpha in enumerate(meta["config"]["alphas"]):
        out, back = Logit(alpha)(data["logit/x"]), Logit(alpha).inverse(data["logit/y_in"])
        close(out.value, data[f"logit/{j}/y"], 1e-12)
        close(-out.log_det[:, None], data[f"logit/{j}/delta_logp"], 1e-12)
        close(back.value, data[f"logit/{j}/inverse_x"], 1e-12)
        close(-back.log_det[:, None], data[f"logit/{j}/inverse_delta_logp"], 1e-12)
    close(CenterShift()(data["logit/x"]).value, data["zero_mean/y"], 1e-12)
    for name in meta["config"]["nonlinearities"]:
        value, slope = ACTIVATIONS[name].pair(data["nonlinearity/x"])
        close(value, data[f"nonlinearity/{name}/y"], 1e-12)
        x = data["nonlinearity/x"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(ACTIVATIONS[name].value(x).sum(), x)
        assert torch.allclose(slope, expected, atol=1e-12)


# FFJORD's regularisers as released (batch means inside the ODE; quirks kept: a pulled-back Jᵀf, the first column of J)
def released(name, field, t, x):
    f = field(t, x)
    d = x.shape[1]
    if name == "l1int":
        return f.abs().mean()
    if name == "l2int":
        return f.square().mean(1).sqrt().mean()
    rows = torch.stack([torch.autograd.functional.jacobian(lambda p: field(t, p[None])[0], p) for p in x])
    if name == "dl2int":
        return torch.einsum("nij,ni->nj", rows, f).square().mean(1).sqrt().mean()
    square, column = rows.square().sum((1, 2)), rows[:, :, 0].square().sum(1)
    if name == "JFrobint":
        return (square.sqrt() / d).mean()
    if name == "JdiagFrobint":
        return (column / d).sqrt().mean()
    assert name == "JoffdiagFrobint"
    return ((square - column) / (d * (d - 1))).mean()


class Released:
    """A released regulariser as a quadrature: the batch's scalar for every row."""

    need = frozenset()

    def __init__(self, name):
        self.name = name

    def __call__(self, t, x, linearization, field):
        return released(self.name, field, t, x).expand(len(x))


def vector_flow(data, meta, steps, divergence, regs=()):
    config, state = meta["config"], substate(data)
    blocks = []
    for i in range(config["num_blocks"]):
        field = MLP(config["data_shape"][0], config["dims"], config["layer_type"], config["nonlinearity"]).double()
        for j, layer in enumerate(field.layers):
            put(layer, state, f"chain.{i}.odefunc.odefunc.diffeq.layers.{j}")
        solver = FixedGrid("rk4", steps)
        blocks.append(CNF(field, divergence, solver, solver, [Released(r) for r in regs], end_time=config["T"]))
    return Sequential(blocks)


def replayed(data, meta):
    return Noise.replay({f"{i}/probe": data[f"probe/{i}"] for i in range(meta["config"]["num_blocks"]) if f"probe/{i}" in data})


@pytest.mark.parametrize("path", files("c_"))
def test_vector_flows(path):
    data, meta = read(path)
    config = meta["config"]
    steps = round(config["T"] / config["rk4_step"])
    flow = vector_flow(data, meta, steps, Exact())
    t = torch.tensor(config["field_t"], dtype=torch.float64)
    for i, block in enumerate(flow.transforms):
        x = data[f"rk4/cnf/{i}/state_in"]
        exact = linearize(block.field, t, x, None, None, {"div"}, Exact())
        close(exact.dx, data[f"field/{i}/f"], 1e-12)
        close(-exact.div[:, None], data[f"field/{i}/minus_div"], 1e-12)
        one = block(x)
        close(one.value, data[f"rk4/cnf/{i}/state_out"], 1e-11)
        close(-one.log_det[:, None], data[f"rk4/cnf/{i}/delta_logp_step"], 1e-11)
    found = flow(data["x"])
    close(found.value, data["rk4/z"], 1e-11)
    close(-found.log_det[:, None], data["rk4/delta_logp"], 1e-11)
    assert found.stats.nfe == int(data["rk4/nfe"].sum()) if "rk4/nfe" in data else True
    back = flow.inverse(data["reverse/z"])
    close(back.value, data["reverse/rk4/x"], 1e-11)
    close(-back.log_det[:, None], data["reverse/rk4/delta_logp"], 1e-11)
    for mode in ("forward", "reverse") if "hutchinson/rk4/z" in data else ():
        noisy = vector_flow(data, meta, steps, Hutchinson("gaussian", mode))(data["x"], noise=replayed(data, meta))
        close(noisy.value, data["hutchinson/rk4/z"], 1e-11)
        close(-noisy.log_det[:, None], data["hutchinson/rk4/delta_logp"], 1e-11)
    with torch.no_grad():
        exact = vector_flow(data, meta, config["exact_steps"], Exact(closed_form=False))(data["x"])
        log_prob = torch.distributions.Normal(0, 1).log_prob(exact.value).sum(1) + exact.log_det
    close(exact.value, data["exact/z"], 1e-9)
    close(log_prob, data["exact/log_prob"], 1e-8)
    errors = meta["max_abs_diff_dopri5_vs_exact"]
    assert float((log_prob - data["log_prob"]).abs().max()) < 3 * errors["log_prob"]


@pytest.mark.parametrize("path", [p for p in files("c_") if "regs" in p.id])
def test_released_regularisers(path):
    data, meta = read(path)
    config = meta["config"]
    flow = vector_flow(data, meta, round(config["T"] / config["rk4_step"]), Exact(), config["regs"])
    t = torch.tensor(config["field_t"], dtype=torch.float64)
    for i, block in enumerate(flow.transforms):
        for name in config["regs"]:
            value = released(name, lambda s, y, b=block: b.field(s, y), t, data[f"rk4/cnf/{i}/state_in"])
            close(value, data[f"field/{i}/reg/{name}"], 1e-12)
    found = flow(data["x"])
    for name in config["regs"]:
        close(found.integrals[name][0], data[f"rk4/reg/{name}"], 1e-11)


def test_golden_files_are_here():
    assert len(files("")) >= 6, f"no golden files in {OWN}"
