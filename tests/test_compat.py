"""Released checkpoints: against the released formulas written out here, and everything that must be refused."""

import argparse
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import F64, Malicious
from test_golden import files, read, substate

import cnf.compat
from cnf.compat import RELEASED, load_reference, read_reference, released
from cnf.errors import CheckpointError, ConfigError
from cnf.fields import MLP
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Bound, Exact, Hutchinson
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Request, Rescale

LAYER = "chain.1.odefunc.odefunc.diffeq.layers.0"
STRIDES = {1: (3, 1, 1), 0: (1, 1, 0), 2: (4, 2, 1), -2: (4, 2, 1)}


# -- the released layers and nets, written out from the golden files' README (section 3) -------------------------------


def make_layer(kind, inputs, outputs, stride, generator):
    """Random parameters by their released names; ``stride`` None for vectors."""

    def rand(*shape):
        return 0.4 * torch.randn(*shape, dtype=F64, generator=generator)

    extra = {"concat": 1, "concatcoord": 1 if stride is None else 3}.get(kind, 0)
    if stride is None:
        shape = (outputs, inputs + extra)
    else:
        k = STRIDES[stride][0]
        shape = (inputs + extra, outputs, k, k) if stride == -2 else (outputs, inputs + extra, k, k)
    if kind == "hyper":
        total = math.prod(shape) + outputs
        if stride is None:
            return {
                "_hypernet.0.weight": rand(8, 1),
                "_hypernet.0.bias": rand(8),
                "_hypernet.2.weight": rand(total, 8),
                "_hypernet.2.bias": rand(total),
            }
        return {"_hypernet.weight": rand(total, 1), "_hypernet.bias": rand(total)}
    if kind == "blend":
        return {f"_layer{i}.{n}": rand(*s) for i in (0, 1) for n, s in (("weight", shape), ("bias", (outputs,)))}
    found = {"_layer.weight": rand(*shape), "_layer.bias": rand(outputs)}
    if kind == "squash":
        found |= {"_hyper.weight": rand(outputs, 1), "_hyper.bias": rand(outputs)}
    if kind == "concatsquash":
        found |= {
            "_hyper_gate.weight": rand(outputs, 1),
            "_hyper_gate.bias": rand(outputs),
            "_hyper_bias.weight": rand(outputs, 1),
        }
    return found


def run_layer(kind, p, outputs, stride, t, x):
    def apply(weight, bias, y):
        if stride is None:
            return F.linear(y, weight, bias)
        _, step, pad = STRIDES[stride]
        return (F.conv_transpose2d if stride == -2 else F.conv2d)(y, weight, bias, stride=step, padding=pad)

    def column(v):
        return v if stride is None else v[:, None, None]

    if kind == "hyper":
        if stride is None:
            theta = F.linear(
                torch.tanh(F.linear(t[None], p["_hypernet.0.weight"], p["_hypernet.0.bias"])),
                p["_hypernet.2.weight"],
                p["_hypernet.2.bias"],
            )
            return apply(theta[outputs:].reshape(outputs, x.shape[1]), theta[:outputs], x)
        theta = F.linear(t[None], p["_hypernet.weight"], p["_hypernet.bias"])
        k = STRIDES[stride][0]
        shape = (x.shape[1], outputs, k, k) if stride == -2 else (outputs, x.shape[1], k, k)
        return apply(
            theta[: math.prod(shape)].reshape(shape), theta[:outputs], x
        )  # the released bias: the weight's start
    if kind == "blend":
        first, second = (apply(p[f"_layer{i}.weight"], p[f"_layer{i}.bias"], x) for i in (0, 1))
        return first + (second - first) * t
    if kind in ("concat", "concatcoord"):
        plane = torch.ones_like(x[:, :1]) * t
        if kind == "concat" or stride is None:
            x = torch.cat([plane, x], 1)
        else:
            rows = torch.arange(x.shape[2], dtype=F64)[:, None].expand(x.shape[2:])
            columns = torch.arange(x.shape[3], dtype=F64)[None].expand(x.shape[2:])
            x = torch.cat([x, plane, rows.expand(len(x), 1, -1, -1), columns.expand(len(x), 1, -1, -1)], 1)
    y = apply(p["_layer.weight"], p["_layer.bias"], x)
    if kind == "squash":
        return y * torch.sigmoid(column(p["_hyper.weight"][:, 0] * t + p["_hyper.bias"]))
    if kind == "concatsquash":
        gate = torch.sigmoid(column(p["_hyper_gate.weight"][:, 0] * t + p["_hyper_gate.bias"]))
        return y * gate + column(p["_hyper_bias.weight"][:, 0] * t)
    return y


class Net:
    """A released net: random weights, and what it computes."""

    def __init__(self, kind, channels, hidden, strides, seed, act=F.softplus):
        generator = torch.Generator().manual_seed(seed)
        self.kind, self.act = kind, act
        self.sizes = [channels, *hidden, channels]
        self.strides = strides if strides is not None else [None] * (len(hidden) + 1)
        self.layers = [
            make_layer(kind, a, b, s, generator)
            for a, b, s in zip(self.sizes, self.sizes[1:], self.strides, strict=False)
        ]

    def state(self, prefix):
        return {f"{prefix}.layers.{j}.{name}": v for j, layer in enumerate(self.layers) for name, v in layer.items()}

    def __call__(self, t, x):
        for j, (layer, out, stride) in enumerate(zip(self.layers, self.sizes[1:], self.strides, strict=True)):
            x = run_layer(self.kind, layer, out, stride, t, x)
            x = self.act(x) if j + 1 < len(self.layers) else x
        return x


def root(value=1.0):
    return torch.tensor(math.sqrt(value), dtype=F64)


def checkpoint(net=None, blocks=2, **args):
    """A stack of convolutions, as FFJORD's train_cnf.py writes it without --multiscale."""
    nets = [net or Net("concat", 1, (3, 4), [1, 1, 1], seed) for seed in range(blocks)]
    state = {}
    for i, n in enumerate(nets, 1):
        state |= {f"chain.{i}.sqrt_end_time": root(), f"chain.{i}.odefunc._num_evals": torch.tensor(3.0)}
        state |= n.state(f"chain.{i}.odefunc.odefunc.diffeq")
    recorded = {
        "data": "mnist", "imagesize": 8, "dims": "3,4", "strides": "1,1,1", "num_blocks": blocks, "alpha": 0.05,
        "nonlinearity": "softplus", "layer_type": "concat", "time_length": 1.0, "train_T": False, "solver": "dopri5",
        "atol": 1e-4, "rtol": 1e-3, "step_size": None, "test_solver": None, "rademacher": True, "l2int": None, "conv": True,
        "save": "experiments/cnf",
    }  # fmt: skip
    return {"args": argparse.Namespace(**(recorded | args)), "state_dict": state, "optim_state_dict": {"step": 1}}, nets


def saved(tmp_path, content):
    path = tmp_path / "checkpt.pth"
    torch.save(content, path)
    return path


# -- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 0, 1), (2, 1, -2)])
@pytest.mark.parametrize("kind", ["ignore", "concat", "concatsquash", "concatcoord", "blend", "hyper"])
def test_stacks_of_convolutions(kind, strides):
    net = Net(kind, 1, (3, 4), strides, 0)
    content, _ = checkpoint(net, blocks=1, strides=",".join(map(str, strides)))
    flow = load_reference(content)
    t, x = torch.tensor(0.3, dtype=F64), torch.randn(2, 1, 8, 8, dtype=F64)
    field = flow.blocks[0].field
    assert torch.allclose(field(t, x), net(t, x), atol=1e-12)
    v = torch.randn(1, 2, 1, 8, 8, dtype=F64)
    assert torch.allclose(field.jvp(t, x, v)[1][0], torch.func.jvp(lambda y: net(t, y), (x,), (v[0],))[1], atol=1e-12)
    assert not flow.training and flow.levels == 256 and flow.event_shape == (1, 8, 8)


@pytest.mark.parametrize("kind", ["ignore", "concat", "squash", "concatsquash", "concatcoord", "blend", "hyper"])
def test_stacks_on_vectors(kind):
    """As train_toy.py and train_tabular.py write them, the end time learned."""
    nets = [Net(kind, 3, (5, 4), None, seed, torch.tanh) for seed in (0, 1)]
    state = {}
    for i, net in enumerate(nets):
        state |= {f"module.chain.{i}.sqrt_end_time": root(0.25 * (i + 1))} | net.state(
            f"module.chain.{i}.odefunc.odefunc.diffeq"
        )
    args = {
        "dims": "5-4",
        "num_blocks": 2,
        "nonlinearity": "tanh",
        "train_T": True,
        "time_length": 0.5,
        "layer_type": kind,
    }
    flow = load_reference(state, args)
    assert flow.event_shape == (3,) and flow.levels is None
    x = torch.randn(4, 3, dtype=F64)
    for i, (block, net) in enumerate(zip(flow.blocks, nets, strict=True)):
        t = torch.tensor(0.1, dtype=F64)
        assert torch.allclose(block.field(t, x), net(t, x), atol=1e-12)
        assert (
            torch.allclose(block.end_time(x), torch.tensor(0.25 * (i + 1), dtype=F64))
            and block.sqrt_end_time.requires_grad
        )
        assert isinstance(block.divergence, Exact)


def test_the_multiscale_parallel_model():
    nets = [[Net("concat", 2 * 4**s, (3,), [1, 1], 10 * b + s) for s in range(4)] for b in range(2)]
    state = {}
    for b, row in enumerate(nets, 1):
        state[f"transforms.0.chain.{b}.sqrt_end_time"] = root()
        for s, net in enumerate(row):
            state |= net.state(f"transforms.0.chain.{b}.odefunc.diffeq.models.{s}")
    flow = load_reference(state, {"dims": "3", "num_blocks": 2, "alpha": 1e-6}, event_shape=(2, 8, 8))
    t, x = torch.tensor(0.7, dtype=F64), torch.randn(2, 2, 8, 8, dtype=F64)
    for block, row in zip(flow.blocks, nets, strict=True):
        total, y = torch.zeros_like(x), x
        for s, net in enumerate(row):
            part = net(t, y)
            for _ in range(s):
                part = F.pixel_shuffle(part, 2)
            total, y = total + part, F.pixel_unshuffle(y, 2) if s < 3 else y
        assert torch.allclose(block.field(t, x), total, atol=1e-12)
    assert flow.latent_shape == (2, 8, 8)


def test_squeeze_first_and_the_order_of_blocks():
    """RNODE's squeeze_first; every block has weights of its own, in the order of execution."""
    shapes = [4, 16, 8]
    nets = [Net("concat", c, (3,), [1, 1], c) for c in shapes]
    state = {}
    for place, net in zip(("0.chain.1", "0.chain.3", "1.chain.0"), nets, strict=True):
        state |= {f"transforms.{place}.sqrt_end_time": root()} | net.state(f"transforms.{place}.odefunc.odefunc.diffeq")
    args = {
        "data": "mnist",
        "imagesize": 16,
        "dims": "3",
        "strides": "1,1",
        "num_blocks": 1,
        "alpha": 1e-5,
        "squeeze_first": True,
        "div_samples": 2,
    }
    flow = load_reference(state, args)
    assert flow.latent_shape == (256,) and flow.event_shape == (1, 16, 16)
    t = torch.tensor(0.2, dtype=F64)
    for block, net, c in zip(flow.blocks, nets, shapes, strict=True):
        x = torch.randn(1, c, 4, 4, dtype=F64)
        assert torch.allclose(block.field(t, x), net(t, x), atol=1e-12)
        assert (
            block.divergence.probes == 2 and block.divergence.distribution == "gaussian" and block.divergence.mode == "reverse"
        )


def test_options_that_change_the_function():
    net = Net("concat", 1, (3, 4), [1, 1, 1], 0, torch.tanh)
    content, _ = checkpoint(net, 1, residual=True, alpha=-1.0, nonlinearity="tanh", nbits=5, time_length=0.5)
    content["state_dict"]["chain.1.sqrt_end_time"] = root(0.5).float()
    flow = load_reference(content)
    t, x = torch.tensor(0.3, dtype=F64), torch.rand(2, 1, 8, 8, dtype=F64)
    assert torch.allclose(flow.blocks[0].field(t, x), net(t, x) - x, atol=1e-12)
    assert isinstance(flow.transform.transforms[1], Rescale) and flow.levels == 32
    assert flow.blocks[0].fixed_end_time == 0.5  # as recorded, not the rounded root squared
    with pytest.raises(CheckpointError, match=r"time_length is 0\.5, but the blocks' end times are \[1\.0"):
        load_reference(checkpoint(time_length=0.5)[0])


def test_solvers_and_traces_as_recorded():
    flow = load_reference(
        checkpoint(solver="rk4", step_size=0.25, test_solver="bosh3", test_rtol=1e-6, test_atol=0.0)[0]
    )
    for block in flow.blocks:
        assert isinstance(block.solver, FixedGrid) and (block.solver.method, block.solver.steps) == ("rk4", 4)
        assert (block.eval_solver.method, block.eval_solver.rtol, block.eval_solver.atol) == ("bosh3", 1e-6, 1e-4)
        assert isinstance(block.divergence, Hutchinson) and block.divergence.distribution == "rademacher"
    flow = load_reference(checkpoint(solver="adams", divergence_fn="brute_force")[0])
    for block in flow.blocks:
        assert isinstance(block.solver, Adaptive) and (block.solver.method, block.solver.rtol) == ("dopri5", 1e-3)
        assert block.eval_solver.method == "dopri5" and isinstance(block.divergence, Exact)


def test_a_file_loads_and_scores_pixels(tmp_path):
    content, _ = checkpoint()
    content["fixed_z"] = torch.zeros(2, 1, 8, 8)
    path = saved(tmp_path, content)
    flow, direct = load_reference(path), load_reference(content)
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(flow.bits_per_dim(x, noise=Noise(0)), direct.bits_per_dim(x, noise=Noise(0)))
    assert flow.sample(2, noise=Noise(0)).shape == (2, 1, 8, 8)
    half = {k: v.float() for k, v in content["state_dict"].items()}
    assert load_reference(half, content["args"]).like.dtype == torch.float32
    # what is given beside the file stands above what is in it
    assert load_reference(path, {"alpha": 0.2}).transform.transforms[1].alpha == 0.2
    found = read_reference(path)
    assert (
        found.args.values["dims"] == "3,4"
        and "l2int" not in found.args
        and not any("_num_evals" in k for k in found.state)
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["args", "value", "state", "whole", "plain pickle"])
def test_a_malicious_file_executes_nothing(tmp_path, where):
    marker = tmp_path / "executed"
    content, _ = checkpoint()
    if where == "args":
        content["args"] = Malicious(marker)
    elif where == "value":
        content["args"].alpha = Malicious(marker)
    elif where == "state":
        content["state_dict"]["chain.1.evil"] = Malicious(marker)
    else:
        content = Malicious(marker)
    path = tmp_path / "checkpt.pth"
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"cannot be read .*refused"):
        load_reference(path)
    assert not marker.exists()
    # torch's list of allowed classes is as it was
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_truncated_file(tmp_path, keep):
    path = saved(tmp_path, checkpoint()[0])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot be read .*damaged"):
        load_reference(path)


@pytest.mark.parametrize(("content", "match"), [
    (b"no checkpoint", "cannot be read"),
    ([1, 2], "holds a list"),
    ({"state_dict": [1]}, "state_dict is a list"),
    ({"state_dict": {}}, "no weights"),
    ({"state_dict": {"chain.1.odefunc.diffeq.layers.0._layer.weight": "x"}}, "is a str, expected a dense tensor"),
    ({"state_dict": {"a": torch.zeros(2, dtype=torch.int64)}}, "is a tensor of torch.int64"),
    ({"state_dict": {"a": torch.zeros(1).expand(10**6)}}, "more than its file holds"),
    ({"state_dict": {"a": torch.zeros(2)}, "args": [1]}, "args is a list"),
])  # fmt: skip
def test_content_of_another_form(tmp_path, content, match):
    path = tmp_path / "checkpt.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=match):
        load_reference(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_reference(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_reference(tmp_path)


@pytest.mark.parametrize(("args", "match"), [
    ({"dims": (3, 4)}, "args.dims must be of type str, got tuple"),
    ({"alpha": torch.tensor(0.1)}, "args.alpha must be of type float, got Tensor"),
    ({"alpha": "0.1"}, "args.alpha must be of type float, got '0.1'"),
    ({"alpha": 0.7}, r"alpha must be inside \(0, 0.5\), got 0.7"),
    ({"alpha": math.nan}, "args.alpha must be finite, got nan"),
    ({"alpha": 10**400}, "args.alpha must be finite, got inf"),
    ({"rtol": math.nan}, "args.rtol must be finite, got nan"),
    ({"test_atol": math.inf}, "args.test_atol must be finite, got inf"),
    ({"nbits": 10**12}, "args.nbits must be between 1 and 8, got 1000000000000"),
    ({"nbits": 0}, "args.nbits must be between 1 and 8, got 0"),
    ({"step_size": 5e-324, "solver": "rk4"}, "args.step_size must be at least 1e-05, got 5e-324"),
    ({"dims": None}, "args has no 'dims'"),
    ({"dims": "3,x"}, "must be whole numbers"),
    ({"dims": "3,5"}, "_layer.bias has shape"),
    ({"dims": "3"}, "gives 2 layers, but the checkpoint's block 1 has 3|strides"),
    ({"dims": "3,4,4"}, "gives 4 layers|strides"),
    ({"dims": "3,999999999999"}, "no flow can be built|has shape"),
    ({"dims": "3,99999999999999999999999999"}, "no flow can be built|has shape"),
    ({"dims": "3,-4"}, "must be whole numbers of at least 1"),
    ({"strides": "1,0,1"}, "has shape"),
    ({"num_blocks": 1}, "give 1 blocks, but the checkpoint has 2"),
    ({"num_blocks": 10**12}, "the checkpoint has only 2 blocks"),
    ({"num_blocks": True}, "args.num_blocks must be of type int, got True"),
    ({"imagesize": 10**12}, "args.imagesize must be between 1 and 4096, got"),
    ({"data": "lsun"}, "pass event_shape"),
    ({"data": "cifar10"}, "the architecture differs, or args.dims"),
    ({"nonlinearity": "swosh"}, "activation='swosh' is unknown"),
    ({"step_size": -1.0, "solver": "rk4"}, "args.step_size must be positive"),
])  # fmt: skip
def test_arguments_that_do_not_fit(args, match):
    with pytest.raises(CheckpointError, match=match):
        load_reference(checkpoint(**args)[0])


@pytest.mark.parametrize(("change", "match"), [
    (lambda s: s.update({"chain.0.weight": torch.zeros(1), "chain.0.running_mean": torch.zeros(1)}), "no counterpart"),
    (lambda s: s.update({"chain.1.odefunc.odefunc.diffeq.activation_fns.0.beta": torch.ones(())}), "no counterpart"),
    (lambda s: s.update({"net.0.weight": torch.zeros(2)}), "no counterpart"),
    (lambda s: s.pop("chain.2.sqrt_end_time"), "lacks a block's end time"),
    (lambda s: s.pop("chain.1.odefunc.odefunc.diffeq.layers.1._layer.weight"), "which belong to no layer type"),
    (lambda s: s.pop("chain.2.odefunc.odefunc.diffeq.layers.1._layer.weight"), "is missing, expected"),
    (lambda s: [s.pop(k) for k in list(s) if "chain.2.odefunc" in k and "layers.1" in k], "block 2 is incomplete"),
    (lambda s: s.update({f"{LAYER}._hyper_bias.weight": torch.zeros(3, 1)}), "belong to no layer type"),
    (lambda s: s.update({"chain.2.odefunc.odefunc.diffeq.layers.0.extra": torch.zeros(3, 1)}), "expected no such weight"),
])  # fmt: skip
def test_another_architecture(change, match):
    content, _ = checkpoint()
    change(content["state_dict"])
    with pytest.raises(CheckpointError, match=match):
        load_reference(content)


def test_an_end_time_that_is_not_finite():
    content, _ = checkpoint()
    for name, value in content["state_dict"].items():
        if name.endswith("sqrt_end_time"):
            value.fill_(math.inf)
    vars(content["args"]).pop("time_length", None)
    with pytest.raises(CheckpointError, match="end_time=inf; expected a finite number"):
        load_reference(content)


def test_a_squash_convolution_which_the_released_code_cannot_run():
    content, _ = checkpoint(Net("squash", 1, (3, 4), [1, 1, 1], 0), 1)
    assert load_reference(content).blocks[0].field.layers[0].has_gate  # as it should be built
    for name in [k for k in content["state_dict"] if k.endswith("_layer.weight")]:
        weight = content["state_dict"][name]
        content["state_dict"][name] = torch.cat([weight, weight[:, :1]], 1)  # as it is
    with pytest.raises(CheckpointError, match="architecture differs"):
        load_reference(content)


@pytest.mark.parametrize("path", [*files("f_affjord_toy2d"), *files("g_")])
def test_golden_files_of_other_codes_are_refused(path):
    data, meta = read(path)
    config = meta["config"]
    dims = ",".join(map(str, config.get("dims", [8])))
    args = {"dims": dims, "num_blocks": config.get("num_blocks", 1), "alpha": 1e-6, "strides": "1,1,1,1"}
    with pytest.raises(CheckpointError):
        load_reference(substate(data), args, event_shape=tuple(config.get("data_shape", (2,))))


def test_a_multiscale_checkpoint_of_another_size():
    found = [p for p in files("d_rnode_probes")]
    data, meta = read(found[0].values[0])
    config = meta["config"]
    args = {
        "data": "mnist",
        "imagesize": 28,
        "dims": "8,8",
        "num_blocks": 1,
        "alpha": 1e-5,
        "strides": "1,0,1",
        "div_samples": 2,
    }
    assert config["data_shape"] == [1, 8, 8]
    with pytest.raises(CheckpointError, match="give 5 blocks, but the checkpoint has 3: check args"):
        load_reference(substate(data), args)
    with pytest.raises(CheckpointError, match="must be multiples of"):
        load_reference(substate(data), args | {"imagesize": 30})


# -- the released regularisers -----------------------------------------------------------------------------------------


def exact(field, t, x):
    j = torch.stack(
        [torch.autograd.functional.jacobian(lambda p: field(t, p[None])[0], row, create_graph=True) for row in x]
    )
    f = field(t, x)
    dt = torch.func.jvp(lambda s: field(s, x), (t,), (torch.ones_like(t),))[1]
    d = x.shape[1]
    pulled = torch.einsum("nij,ni->nj", j, f)
    column = j[:, :, 0].square().sum(1)
    total = j.square().sum((1, 2))
    return {
        "kinetic_energy": 0.5 * f.square().mean(1),
        "jacobian_norm2": total / d,
        "directional_penalty": 0.5 * pulled.square().mean(1),
        "total_deriv": 0.5 * (pulled + dt).square().mean(1),
        "l1int": f.abs().mean(1),
        "l2int": f.square().mean(1).sqrt(),
        "dl2int": pulled.square().mean(1).sqrt(),
        "JFrobint": total.sqrt() / d,
        "JdiagFrobint": (column / d).sqrt(),
        "JoffdiagFrobint": (total - column) / (d * (d - 1)),
    }


def test_released_regularisers_and_their_gradients():
    """Against autodiff Jacobians, values and gradients with respect to the weights and the point."""
    torch.manual_seed(0)
    field = MLP(3, (5,)).double()
    t = torch.tensor(0.3, dtype=F64)
    for recording in (True, False):
        x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_(recording)
        expected = exact(field, t, x)
        for name, wanted in expected.items():
            quadrature = released(name)
            with torch.set_grad_enabled(recording):
                parts = Exact(closed_form=False).linearize(field, t, x, None, None, quadrature.need)
                value = quadrature(t, x, parts, Bound(field))
            assert torch.allclose(value, wanted, atol=1e-12), name
            assert value.requires_grad == recording
            if recording:
                inputs = [x, *field.parameters()]
                # a last bias is none of the Jacobian's business
                ours, theirs = (
                    torch.autograd.grad(v.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
                    for v in (value, wanted)
                )
                for a, b in zip(ours, theirs, strict=True):
                    assert torch.allclose(a, b, atol=1e-10), name
    assert set(RELEASED) == set(expected)
    with pytest.warns(DeprecationWarning, match="FFJORD_REGULARISERS is called RELEASED"):
        assert cnf.compat.FFJORD_REGULARISERS is RELEASED
    with pytest.raises(ConfigError, match=r"regulariser='l3int' is unknown.*did you mean 'l2int'"):
        released("l3int")


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_released_regularisers_train_in_checkpointed_blocks(mode):
    """The gradient of every one of them through a solve is the same with and without checkpoints."""
    gradients = []
    for gradient in ("direct", "checkpoint"):
        torch.manual_seed(0)
        names = ("kinetic_energy", "jacobian_norm2", "directional_penalty", "total_deriv", "dl2int", "JFrobint")
        solver = FixedGrid("rk4", 2, gradient)
        block = CNF(
            MLP(3, (5,)), Hutchinson("gaussian", mode), solver, quadratures=[released(n) for n in names]
        ).double()
        out = block(torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), Request(noise=Noise(0)))
        assert set(out.integrals) == set(names)
        sum(v.sum() for v in out.integrals.values()).backward()
        gradients.append([p.grad for p in block.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
