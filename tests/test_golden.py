"""The published codes' numeric outputs, through the library and through ``cnf.compat``, where their quirks live."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, slow

from cnf.compat import load_reference, released
from cnf.fields import MLP, Conv, Linear, time_layer
from cnf.fields.activations import ACTIVATIONS
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Bound, Exact, Hutchinson
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Logit, Request, Rescale, Sequential, Squeeze

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


def config_of(param):
    return read(param.values[0])[1]["config"]


def close(found, expected, tolerance):
    expected = expected.detach()
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
    data, meta = read(path)
    state = substate(data)
    assert meta["config"]["layers"]
    for name, about in meta["config"]["layers"].items():
        kind, options = about["cls"].removesuffix("Conv2d").removesuffix("Linear").lower(), about["kw"]
        if about["cls"].endswith("Linear"):
            linear = Linear(about["in"], about["out"])
        else:
            sizes = options["ksize"], options["stride"], options["padding"], options.get("transpose", False)
            linear = Conv(about["in"], about["out"], *sizes)
        layer = time_layer(kind, linear).double()
        put(layer, state, name)
        x = data[f"{name}/x"].clone().requires_grad_()
        out = layer(data[f"{name}/t"], x)
        close(out, data[f"{name}/y"], 1e-12)
        close(torch.autograd.grad((out * data[f"{name}/e"]).sum(), x)[0], data[f"{name}/vjp"], 1e-12)


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
    close(Rescale()(data["logit/x"]).value, data["zero_mean/y"], 1e-12)
    for name in meta["config"]["nonlinearities"]:
        value, slope = ACTIVATIONS[name].pair(data["nonlinearity/x"])
        # torch's softplus is x itself above 20, which is off by e^-20 there; ours is not
        close(value, data[f"nonlinearity/{name}/y"], 1e-10 if name == "softplus" else 1e-12)
        x = data["nonlinearity/x"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(ACTIVATIONS[name].value(x).sum(), x)
        assert torch.allclose(slope, expected, atol=1e-12)


def vector_flow(data, meta, steps, divergence, regs=()):
    config, state = meta["config"], substate(data)
    blocks = []
    for i in range(config["num_blocks"]):
        field = MLP(config["data_shape"][0], config["dims"], config["layer_type"], config["nonlinearity"]).double()
        for j, layer in enumerate(field.layers):
            put(layer, state, f"chain.{i}.odefunc.odefunc.diffeq.layers.{j}")
        solver = FixedGrid("rk4", steps)
        blocks.append(CNF(field, divergence, solver, solver, [released(r) for r in regs], end_time=config["T"]))
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
        exact = Exact().linearize(block.field, t, x, None, None, frozenset({"div"}))
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
        noisy = vector_flow(data, meta, steps, Hutchinson("gaussian", mode))(data["x"], Request(noise=replayed(data, meta)))
        close(noisy.value, data["hutchinson/rk4/z"], 1e-11)
        close(-noisy.log_det[:, None], data["hutchinson/rk4/delta_logp"], 1e-11)
    with torch.no_grad():
        exact = vector_flow(data, meta, config["exact_steps"], Exact(closed_form=False))(data["x"])
        log_prob = torch.distributions.Normal(0, 1).log_prob(exact.value).sum(1) + exact.log_det
    close(exact.value, data["exact/z"], 1e-9)
    close(log_prob, data["exact/log_prob"], 1e-8)
    errors = meta["max_abs_diff_dopri5_vs_exact"]
    assert float((log_prob - data["log_prob"]).abs().max()) < 3 * errors["log_prob"]


@pytest.mark.parametrize("path", [p for p in files("c_") if config_of(p).get("regs")])
def test_released_regularisers(path):
    """FFJORD keeps the batch's mean; ours are one value a row, whose mean it is."""
    data, meta = read(path)
    config = meta["config"]
    flow = vector_flow(data, meta, round(config["T"] / config["rk4_step"]), Exact(), config["regs"])
    t = torch.tensor(config["field_t"], dtype=torch.float64)
    for i, block in enumerate(flow.transforms):
        x = data[f"rk4/cnf/{i}/state_in"]
        parts = Exact().linearize(block.field, t, x, None, None, frozenset())
        for name in config["regs"]:
            value = released(name)(t, x, parts, Bound(block.field))
            close(value.mean(), data[f"field/{i}/reg/{name}"], 1e-12)
    found = flow(data["x"])
    for name in config["regs"]:
        close(found.integrals[name].mean(), data[f"rk4/reg/{name}"], 1e-11)


def arguments(config):
    """What the released script would have recorded beside these weights."""
    rnode = config["repo"] == "rnode"
    args = {
        "data": config["data"],
        "num_blocks": config["num_blocks"],
        "nonlinearity": config["nonlinearity"],
        "layer_type": config["layer_type"],
        "time_length": config["T"],
        "train_T": not rnode,
        "dims": ("," if "alpha" in config else "-").join(map(str, config["dims"])),
    }
    if "alpha" in config:
        args |= {"alpha": config["alpha"], "nbits": config["nbits"], "imagesize": config["data_shape"][1]}
    if rnode:
        strides = config.get("strides", [1] * (len(config["dims"]) + 1))
        args |= {"div_samples": config.get("div_samples", 1), "zero_last": True, "strides": ",".join(map(str, strides))}
    elif "probe" in config:
        args["rademacher"] = config["probe"] == "rademacher"
    return args


def loaded(data, meta, solver, regs=()):
    """The golden weights as a checkpoint, loaded; and the golden probes for its places."""
    flow = load_reference(substate(data), arguments(meta["config"]))
    for block in flow.blocks:
        block.eval_solver, block.quadratures = solver, tuple(released(name) for name in regs)
    names = [name for name, m in flow.named_modules() if isinstance(m, CNF)]
    places = ["/".join(part for part in name.split(".") if part.isdigit()) for name in names]
    assert len(places) == len(meta["config"].get("cnf_state_shapes", places))
    probes = {f"{place}/probe": data[f"probe/{i}"] for i, place in enumerate(places) if f"probe/{i}" in data}
    return flow, Noise.replay(probes)


def grid(config):
    return FixedGrid("rk4", round(config["T"] / config["rk4_step"]))


IMAGES = [p for letter in "abde" for p in files(f"{letter}_")]
WIDE = 64  # channels from which a model is left to the slow tests
HEAVY = [p if max(config_of(p)["dims"]) < WIDE else slow(*p.values, id=p.id) for p in IMAGES]
# the largest, whose field, gradient and exact solution other tests take
# the other files of FFJORD's concat and of RNODE are smaller models of the same kinds
SMALLER = [p if p.id not in ("b_ffjord_gray_nb2", "d_rnode_nb2") else slow(*p.values, id=p.id) for p in HEAVY]
LARGEST = [p if p.id != "d_rnode_nb2" else slow(*p.values, id=p.id) for p in HEAVY]


@pytest.mark.parametrize("path", LARGEST)
def test_image_models_load_and_agree(path):
    """Field, rk4 and the reverse direction, through a checkpoint."""
    data, meta = read(path)
    config = meta["config"]
    regs = config.get("regs", [])
    flow, noise = loaded(data, meta, grid(config), regs)
    assert sum(p.numel() for p in flow.parameters()) == meta["parameters"]
    t = torch.tensor(config["field_t"], dtype=torch.float64)
    need = frozenset({"div", "jac_sq"})
    for i, block in enumerate(flow.blocks):
        x = data[f"rk4/cnf/{i}/state_in"]
        parts = block.divergence.linearize(block.field, t, x, data[f"probe/{i}"].reshape(-1, *x.shape), None, need)
        close(parts.dx, data[f"field/{i}/f"], 1e-12)
        close(-parts.div[:, None], data[f"field/{i}/minus_div"], 1e-12)
        for name in regs:
            close(released(name)(t, x, parts, Bound(block.field)), data[f"field/{i}/reg/{name}"], 1e-12)
    with torch.no_grad():
        out = flow.evaluate(data["x"], Request(noise=noise))
        back = flow.transform.inverse(data["reverse/z"], Request(noise=noise, integrals=False))
    log_prob = flow.base_log_prob(out.value) + out.log_det
    close(out.value, data["rk4/z"], 1e-11)
    close(-out.log_det[:, None], data["rk4/delta_logp"], 1e-11)
    close(log_prob, data["rk4/log_prob"], 1e-11)
    close(flow.to_bits(log_prob, True), data["rk4/bits_per_dim_per_sample"], 1e-11)
    assert out.stats.nfe == int(data["rk4/nfe"].sum())
    for name in regs:
        close(out.integrals[name], data[f"rk4/reg/{name}"], 1e-11)
    close(back.value, data["reverse/rk4/x"], 1e-11)
    close(-back.log_det[:, None], data["reverse/rk4/delta_logp"], 1e-11)
    pixels = flow.evaluate(data["pixels"], Request(noise=Noise.replay({**noise.tensors, "0/dequantize": data["u"]})))
    close(pixels.value, data["rk4/z"], 1e-11)


@pytest.mark.parametrize("path", files("d_"))
def test_rnode_gradients(path):
    """The gradient of RNODE's loss as released, back-propagated through the rk4 steps."""
    data, meta = read(path)
    config = meta["config"]
    flow, noise = loaded(data, meta, grid(config), config["loss_coeff"])
    out = flow.evaluate(data["x"], Request(noise=noise))
    bits = flow.to_bits(flow.base_log_prob(out.value) + out.log_det, True).mean()
    loss = bits + sum(weight * out.integrals[name].mean() for name, weight in config["loss_coeff"].items())
    close(bits, data["rk4/loss_bits_per_dim"], 1e-12)
    close(loss, data["rk4/loss"], 1e-12)
    loss.backward()
    # the gradients, loaded as if they were weights, lie where ours do
    wanted = {f"state/{k}": v for k, v in substate(data, "rk4/grad/").items()}
    ends = {k: v for k, v in data.items() if k.endswith("sqrt_end_time")}
    expected, _ = loaded({**ends, **wanted}, meta, grid(config))
    checked = 0
    for (name, p), q in zip(flow.named_parameters(), expected.parameters(), strict=True):
        assert p.grad is not None, name
        close(p.grad, q, 1e-9)
        checked += p.numel()
    assert checked == meta["parameters"]


def truth(data, flow, noise):
    with torch.no_grad():
        out = flow.evaluate(data["x"], Request(noise=noise))
    log_prob = flow.base_log_prob(out.value) + out.log_det
    return {k: float((v - data[f"exact/{k}"]).abs().max()) for k, v in (("z", out.value), ("log_prob", log_prob))}, out


@pytest.mark.parametrize("path", SMALLER)
def test_image_models_exact_and_top_level(path):
    """The true solution by another method, and dopri5, which lands on T where the reference steps past it."""
    data, meta = read(path)
    hyper = meta["config"]["layer_type"] == "hyper"
    # those that pull f back cost as much as the flow itself: they are in the slow test below
    regs = [r for r in meta["config"].get("regs", []) if r in ("kinetic_energy", "jacobian_norm2")]
    flow, noise = loaded(data, meta, FixedGrid("dopri5", 12), regs)
    error, out = truth(data, flow, noise)
    assert error["z"] < (1e-8 if hyper else 1e-9), error
    assert error["log_prob"] < (1e-6 if hyper else 1e-7), error
    for name, value in out.integrals.items():
        close(value, data[f"exact/reg/{name}"], 1e-9)
    tolerance = meta["config"]["tol"]
    for block in flow.blocks:
        block.eval_solver, block.quadratures = Adaptive("dopri5", tolerance, tolerance), ()
    error, _ = truth(data, flow, noise)
    theirs = meta["max_abs_diff_dopri5_vs_exact"]
    assert error["z"] < theirs["z"] / 5 and error["log_prob"] < theirs["log_prob"] / 5, (error, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGES)
def test_image_models_exact_on_the_same_grid(path):
    data, meta = read(path)
    flow, noise = loaded(data, meta, FixedGrid("rk4", meta["config"]["exact_steps"]), meta["config"].get("regs", []))
    error, out = truth(data, flow, noise)
    assert error["z"] < 1e-10 and error["log_prob"] < 1e-8, error
    for name, value in out.integrals.items():
        close(value, data[f"exact/reg/{name}"], 1e-11)


@pytest.mark.parametrize("path", files("c_"))
def test_vector_flows_load(path):
    """Stacks of vectors load from a checkpoint too; their end time is the stored root squared."""
    data, meta = read(path)
    config = meta["config"]
    flow, _ = loaded(data, meta, grid(config))
    assert flow.event_shape == tuple(config["data_shape"]) and flow.levels is None
    out = flow.evaluate(data["x"])
    close(out.value, data["rk4/z"], 1e-11)
    close(-out.log_det[:, None], data["rk4/delta_logp"], 1e-11)


def test_golden_files_are_here():
    assert len(files("")) >= 8, f"no golden files in {OWN}"
