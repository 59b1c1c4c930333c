"""AFFJORD's released code: its golden files, and its checkpoints against the released formulas written out here."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import F64, slow
from test_golden import close, files, grid, loaded, read, substate, truth

from cnf.compat import affjord_toy, load_affjord_toy, load_reference
from cnf.compat.affjord import ENTRIES, fill_path, released_layer
from cnf.config import preset
from cnf.errors import CheckpointError, ConfigError
from cnf.fields import AugmentedTimeConditioning, Conv, TimePath, time_layer
from cnf.models import build
from cnf.ode.divergence import Exact
from cnf.ode.multiscale import scale_shapes
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Request
from cnf.transforms.request import AugmentedTime

IMAGES = [*files("f_affjord_concat"), *files("f_affjord_hyper")]
TOYS = files("f_affjord_toy2d")


def entries(state):
    """What moves of z* in a released state [z*; z] (N, 2c, h, w): the same in every row."""
    flat = state[:, : state.shape[1] // 2].flatten(1)[:, :ENTRIES]
    assert torch.equal(flat, flat[:1].expand_as(flat))
    return flat[:1]


def point(state):
    return state[:, state.shape[1] // 2 :]


def paths(data, places):
    """g of every block, from the golden weights; a flow of the concat kind has dropped it."""
    found = []
    for place in places:
        path = TimePath(ENTRIES).double()
        fill_path(path, substate(data, f"state/{place}.odefunc.odefunc.diffeq.aug_cnn."))
        found.append(path)
    return found


def places(data):
    return sorted({k.removeprefix("state/").removesuffix(".sqrt_end_time") for k in data if k.endswith("sqrt_end_time")})


# -- golden files: layers and images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", files("h_layers_affjord"))
def test_layers(path):
    data, meta = read(path)
    state = substate(data)
    for name, kind in (("concat_conv", "ignore"), ("hyper_conv", AugmentedTimeConditioning("hyper", ENTRIES, 10))):
        about = meta["config"]["layers"][name]
        conv = Conv(about["in"], about["out"], about["kw"]["ksize"], about["kw"]["stride"], about["kw"]["padding"])
        layer = time_layer(kind, conv).double()
        given = {k: v for k, v in substate(state, f"{name}.").items() if not k.startswith("mixer")}
        layer.load_state_dict(released_layer(given, conv))
        x = data[f"{name}/x"].clone().requires_grad_()
        out = layer(data[f"{name}/aug"].flatten()[:ENTRIES], x)
        close(out, data[f"{name}/y"], 1e-12)
        close(torch.autograd.grad((out * data[f"{name}/e"]).sum(), x)[0], data[f"{name}/vjp"], 1e-12)
    g = TimePath(ENTRIES).double()
    fill_path(g, substate(state, "augmented_dynamics_g."))
    x = data["augmented_dynamics_g/x"].clone().requires_grad_()
    out = F.pad(g(x.flatten(1)[:, :ENTRIES]), (0, x.numel() - ENTRIES)).reshape(x.shape[1:])
    close(out, data["augmented_dynamics_g/y"], 1e-12)
    (slope,) = torch.autograd.grad((out * data["augmented_dynamics_g/e"]).sum(), x)
    close(slope, data["augmented_dynamics_g/vjp"], 1e-12)


@pytest.mark.parametrize("path", IMAGES)
def test_images_load_and_agree(path):
    """Fields, z* included, blocks, and the whole flow with rk4."""
    data, meta = read(path)
    config = meta["config"]
    flow, noise = loaded(data, meta, grid(config))
    assert sum(v.numel() for k, v in data.items() if k.startswith("state/")) == meta["parameters"]
    t = torch.tensor(config["field_t"], dtype=F64)
    for i, (block, g) in enumerate(zip(flow.blocks, paths(data, places(data)), strict=True)):
        state = data[f"rk4/cnf/{i}/state_in"]
        z, u, f = point(state), entries(state), data[f"field/{i}/f"]
        time = t if block.path is None else u[0]
        parts = block.divergence.linearize(block.field, time, z, data[f"probe/{i}"][None], None, frozenset({"div"}))
        close(parts.dx, point(f), 1e-12)
        close(-parts.div[:, None], data[f"field/{i}/minus_div"], 1e-12)
        close(g(u), entries(f), 1e-12)
        assert f[:, : f.shape[1] // 2].flatten(1)[:, ENTRIES:].count_nonzero() == 0
        fixed = Noise.replay({"probe": data[f"probe/{i}"]})
        shared = None if block.path is None else AugmentedTime(block.end_time(z), u)
        one = block(z, Request(noise=fixed, augmented_time=shared))
        out = data[f"rk4/cnf/{i}/state_out"]
        close(one.value, point(out), 1e-11)
        close(-one.log_det[:, None], data[f"rk4/cnf/{i}/delta_logp_step"], 1e-11)
        # z* of the concat kind moves in the released code and reaches nothing
        block.path = block.path or g
        close(block.advance_augmented_time(u, block.end_time(z)) if shared is None else shared.value, entries(out), 1e-11)
    flow, noise = loaded(data, meta, grid(config))
    with torch.no_grad():
        out = flow.evaluate(data["x"], Request(noise=noise))
        logit = flow.transform.transforms[1](data["x"]).log_det
        pixels = flow.evaluate(data["pixels"], Request(noise=Noise.replay({**noise.tensors, "0/dequantize": data["u"]})))
    log_prob = flow.base_log_prob(out.value) + out.log_det
    close(out.value, data["rk4/z"], 1e-11)
    close(pixels.value, data["rk4/z"], 1e-11)
    close(-logit[:, None], data["logit_delta_logp"], 1e-12)
    close(-out.log_det[:, None], data["rk4/delta_logp"], 1e-11)
    close(log_prob, data["rk4/log_prob"], 1e-11)
    bits = flow.to_bits(log_prob, True)
    close(bits, data["rk4/bits_per_dim_per_sample"], 1e-11)
    close(bits.mean(), data["rk4/bits_per_dim"], 1e-11)
    assert out.stats.nfe == int(data["rk4/nfe"].sum())


@pytest.mark.parametrize("path", files("f_affjord_hyper"))
def test_the_squeeze_of_z_star(path):
    """20 entries are enough: the released image-shaped z*, before and after a squeeze, against the carried one."""
    data, meta = read(path)
    flow, _ = loaded(data, meta, grid(meta["config"]))
    scales = flow.transform.transforms[-1].scales
    for scale, (before, after) in ((scales[0], (0, 1)), (scales[1], (2, 3))):
        out, entering = (data[f"rk4/cnf/{i}/state_{s}"] for i, s in ((before, "out"), (after, "in")))
        close(scale.between(scale.transforms[1], entries(out)), entries(entering), 1e-15)
        assert scale.between(scale.transforms[0], entries(out)).shape == (1, ENTRIES)


@pytest.mark.parametrize("path", IMAGES)
def test_images_exact_and_top_level(path):
    """The true solution by another method, and dopri5, whose end the released code interpolates."""
    data, meta = read(path)
    hyper = meta["config"]["layer_type"] == "hyper"
    flow, noise = loaded(data, meta, FixedGrid("dopri5", 8))
    error, out = truth(data, flow, noise)
    assert error["z"] < (1e-8 if hyper else 1e-9) and error["log_prob"] < (1e-6 if hyper else 1e-7), error
    close(-out.log_det[:, None], data["exact/delta_logp"], 1e-10)
    tolerance = meta["config"]["tol"]
    for block in flow.blocks:
        block.eval_solver = Adaptive("dopri5", tolerance, tolerance)
    error, out = truth(data, flow, noise)
    theirs = meta["max_abs_diff_dopri5_vs_exact"]
    assert error["z"] < 3 * theirs["z"] and error["log_prob"] < 3 * theirs["log_prob"], (error, theirs)
    log_prob = flow.base_log_prob(out.value) + out.log_det
    bits = flow.to_bits(log_prob, True)
    for key, value in (
        ("z", out.value),
        ("delta_logp", -out.log_det[:, None]),
        ("log_prob", log_prob),
        ("bits_per_dim_per_sample", bits),
        ("bits_per_dim", bits.mean()),
    ):
        assert float((value - data[key]).abs().max()) < 4 * theirs[key], key


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGES)
def test_images_exact_on_the_same_grid(path):
    data, meta = read(path)
    flow, noise = loaded(data, meta, FixedGrid("rk4", meta["config"]["exact_steps"]))
    error, out = truth(data, flow, noise)
    assert error["z"] < 1e-10 and error["log_prob"] < 1e-8, error
    assert out.stats.nfe == int(data["exact/nfe"].sum())


# -- golden files: the 2-D examples ------------------------------------------------------------------------------------


def toy(data, solver):
    flow = load_affjord_toy(substate(data), data.get("seed"))
    flow.blocks[0].eval_solver = solver
    return flow


@torch.no_grad()
def run(flow, data):
    """Every quantity that the golden files name."""
    block, x = flow.blocks[0], data["x"]
    a = block.initial_augmented_time(x)
    shared = None if a is None else AugmentedTime(block.end_time(x), a)
    out = block(x, Request(augmented_time=shared))
    found = {"z": out.value, "delta_logp": -out.log_det[:, None], "log_prob": flow.log_prob(x)}
    return found if shared is None else found | {"aug_end": shared.value[0]}


@pytest.mark.parametrize("path", TOYS)
def test_toys(path):
    """Field, the released grid with its trajectory, and the counts."""
    data, meta = read(path)
    config = meta["config"]
    augmented = config["variant"] == "augmented"
    steps = config["grid_points"] - 1
    flow = toy(data, FixedGrid("rk4", steps))
    assert sum(v.numel() for v in substate(data).values()) == meta["parameters"]
    dead = sum(v.numel() for v in substate(data, "state/hyper_net2.").values())
    assert sum(p.numel() for p in flow.parameters()) == meta["parameters"] - dead + (2 if augmented else 0)
    block, x = flow.blocks[0], data["x"]
    t = torch.tensor(10 - config["field_t"], dtype=F64)  # reversed, and so is the field's sign
    time = block.initial_augmented_time(x)[0] if augmented else t
    for exact in (Exact(), Exact(closed_form=False)):
        parts = exact.linearize(block.field, time, x, None, None, frozenset({"div"}))
        close(-parts.dx, data["field/f"][:, :2], 1e-12)
        close(parts.div[:, None], data["field/minus_div"], 1e-12)
    if augmented:
        close(-block.path(data["seed"][None]).expand(len(x), -1), data["field/f"][:, 2:], 1e-12)
    for name, value in run(flow, data).items():
        close(value, data[f"rk4/{name}"], 1e-11)
    block.eval_solver = FixedGrid("rk4", 1)
    total, drive, step = torch.zeros(len(x), dtype=F64), block.initial_augmented_time(x), 10 / steps
    for i in range(config["grid_points"]):
        state = x if drive is None else torch.cat([x, drive.expand(len(x), -1)], 1)
        close(state, data["rk4/trajectory"][i], 1e-11)
        assert torch.allclose(-total[:, None], data["rk4/trajectory_delta_logp"][i], atol=1e-11)
        times = (torch.tensor(i * step, dtype=F64), torch.tensor((i + 1) * step, dtype=F64))
        with torch.no_grad():
            x, values, solution = block.integrate(x, times, augmented_time=drive)
        total, drive = total + values["log_det"], solution.state[1] if augmented else None


@pytest.mark.parametrize("path", TOYS)
def test_toys_are_the_model_of_the_published_presets(path):
    """AugmentedTimeConditioning("both"), and the plain net, from the presets' settings with the golden weights; the released ODE runs backwards."""
    data, meta = read(path)
    state, width = substate(data), meta["config"]["width"]
    augmented = meta["config"]["variant"] == "augmented"
    seen = 4 if augmented else 2
    config = preset("affjord-toy-published" if augmented else "ffjord-toy-published").config
    flow = build(config.model.change(augmented_time_start="learned" if augmented else "zero"), config.solver, (2,)).double().eval()
    block = flow.blocks[0]
    w, u, gate, b = torch.arange(width * (3 * seen + 1)).split([width * seen] * 3 + [width])
    used = [rows.reshape(width, seen)[:, :2].T.flatten() for rows in (u, gate)]  # the released U and G have outputs that are thrown away
    with torch.no_grad():
        for name, value in (("weight", state["hyper_net.fc3.weight"]), ("bias", state["hyper_net.fc3.bias"])):
            getattr(block.field.layers[0].head, name).copy_(value[torch.cat([w, b])])
            getattr(block.field.layers[1].head, name).copy_(torch.cat([-value[used[0]], value[used[1]]]))
            for i in (0, 2):
                getattr(block.field.generator[i], name).copy_(state[f"hyper_net.fc{i // 2 + 1}.{name}"])
                if augmented:
                    getattr(block.path.net[i], name).copy_((1 - i) * state[f"neunet.fc{i // 2 + 1}.{name}"])
        if augmented:
            block.path.initial.copy_(data["seed"])
        else:  # t from 0 to 10 here
            first = block.field.generator[0]
            first.bias.add_(10 * first.weight[:, 0])
            first.weight.neg_()
    block.eval_solver = FixedGrid("rk4", meta["config"]["grid_points"] - 1)
    for name, value in run(flow, data).items():
        close(value, data[f"rk4/{name}"], 1e-11 if augmented else 1e-6)  # the released plain net rounds t to float32
    # the parameters that act: all of the plain net's, and of the augmented one's, with its seed
    total = sum(p.numel() for p in flow.parameters())
    assert total == (meta["parameters"] if not augmented else meta["parameters"] - 15_936 - 8_448 + 2)


@pytest.mark.parametrize("path", [p if "normal" not in p.id else slow(*p.values, id=p.id) for p in TOYS])
def test_toys_exact_and_top_level(path):
    data, meta = read(path)
    # t is rounded in the plain model, so that only the same grid agrees to the last digits
    rounded = meta["config"]["variant"] == "normal"
    tolerance = 1e-6 if rounded else 1e-9
    for name, value in run(toy(data, FixedGrid("dopri5", 160)), data).items():
        assert float((value - data[f"exact/{name}"]).abs().max()) < tolerance, name
    for name, value in run(toy(data, FixedGrid("rk4", meta["config"]["exact_steps"])), data).items():
        close(value, data[f"exact/{name}"], 1e-9 if name == "delta_logp" else 1e-10)
    theirs = meta["max_abs_diff_dopri5_vs_exact"]
    for name, value in run(toy(data, Adaptive("dopri5", 1e-8, 1e-8)), data).items():
        assert float((value - data[name]).abs().max()) < 4 * theirs[name], name


@pytest.mark.parametrize("path", TOYS)
def test_toys_sample_and_invert(path):
    data, _ = read(path)
    flow, again = (toy(data, Adaptive("dopri5", 1e-7, 1e-7)) for _ in range(2))
    x = data["x"][:8]
    out = flow.evaluate(x)
    back = flow.transform.inverse(out.value)
    assert torch.allclose(back.value, x, atol=1e-4) and torch.allclose(back.log_det, -out.log_det, atol=1e-3)
    assert torch.equal(flow.sample(5, noise=Noise(0)), again.sample(5, noise=Noise(0)))
    assert flow.score(x).isfinite().all()


def test_toy_files(tmp_path):
    """As the released scripts write them; the learned seed is not among what they save."""
    torch.manual_seed(0)
    flow = affjord_toy(True, hidden=5, width=3).eval()
    ours, theirs = ("field.generator.0", "field.generator.2", "field.generator.4"), ("fc1", "fc2", "fc3")
    names = {f"{a}.{p}": f"hyper_net.{b}.{p}" for a, b in zip(ours, theirs, strict=True) for p in ("weight", "bias")}
    names |= {f"path.net.{i}.{p}": f"neunet.fc{j}.{p}" for i, j in ((0, 1), (2, 2)) for p in ("weight", "bias")}
    own = {k.removeprefix("transform."): v for k, v in flow.state_dict().items()}
    state = {theirs: own[ours] for ours, theirs in names.items()} | {"hyper_net2.fc1.weight": torch.zeros(2, 2)}
    file = tmp_path / "ckpt.pth"
    torch.save({"func_state_dict": state, "optimizer_state_dict": {"step": 1}}, file)
    seed = own["path.initial"]
    x = torch.randn(4, 2)
    assert torch.equal(load_affjord_toy(file, seed).log_prob(x), flow.log_prob(x))
    with pytest.raises(CheckpointError, match="seed=None"):
        load_affjord_toy(file)
    with pytest.raises(CheckpointError, match="load_affjord_toy"):
        load_reference(file)
    for bad in (torch.zeros(3), torch.tensor([math.nan, 0]), torch.tensor([1, 2])):
        with pytest.raises(ConfigError, match="seed must be 2 finite floats"):
            load_affjord_toy(state, bad)
    plain = {k: v for k, v in state.items() if k.startswith("hyper_net.")}
    with pytest.raises(CheckpointError, match=r"hyper_net.fc1.weight has shape \(5, 2\)"):
        load_affjord_toy(plain)
    for change in (
        {"hyper_net.fc2.weight": torch.zeros(5, 6)},
        {"hyper_net.fc1.bias": torch.zeros(10**6)},
        {"hyper_net.fc3.bias": torch.zeros(40)},
        {"neunet.fc1.bias": torch.zeros(2)},
        {"neunet.fc3.bias": torch.zeros(2)},
    ):
        with pytest.raises(CheckpointError, match="the checkpoint: "):
            load_affjord_toy(state | change, seed)
    with pytest.raises(CheckpointError, match=r"has no hyper_net\.fc1\.bias"):
        load_affjord_toy({"a": torch.zeros(2)})
    normal = {f"hyper_net.fc{i}.{p}": v for i, w, b in ((1, (5, 1), 5), (2, (5, 5), 5), (3, (21, 5), 21))
              for p, v in (("weight", torch.randn(w)), ("bias", torch.randn(b)))}  # fmt: skip
    assert load_affjord_toy(normal).blocks[0].path is None
    with pytest.raises(ConfigError, match="has no z"):
        load_affjord_toy(normal, seed)
    with pytest.raises(ConfigError, match="instead of t"):
        flow.blocks[0].field(torch.tensor(0.0), x)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def block_shapes(shape, blocks):
    """(place, (c, h, w)) of every released block, in order."""
    scales = scale_shapes(shape)
    for s, (c, h, w) in enumerate(scales):
        for k in range(blocks):
            yield (s, k), (c, h, w)
        for k in range(blocks if s + 1 < len(scales) else 0):
            yield (s, blocks + 1 + k), (4 * c, h // 2, w // 2)


def make(shape, dims, kind, blocks=1, dtype=F64, scale=0.2):
    """A checkpoint as the released train_cnf.py writes it, with random weights."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size):
        return scale * torch.randn(*size, dtype=dtype, generator=generator)

    state = {}
    for (s, k), (c, _, _) in block_shapes(shape, blocks):
        place = f"transforms.{s}.chain.{k}"
        state |= {f"{place}.sqrt_end_time": torch.ones((), dtype=dtype), f"{place}.odefunc._num_evals": torch.zeros(())}
        net = f"{place}.odefunc.odefunc.diffeq"
        for name in ("fc1", "fc2"):
            state |= {f"{net}.aug_cnn.{name}.weight": rand(20, 20), f"{net}.aug_cnn.{name}.bias": rand(20)}
        state |= {f"{net}.aug_cnn.network.0.weight": rand(1, 1, 1, 1), f"{net}.aug_cnn.network.0.bias": rand(1)}
        sizes = [2 * c, *dims, 2 * c]
        for j, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
            layer = f"{net}.layers.{j}"
            if kind == "concat":
                state |= {f"{layer}._layer.weight": rand(b, a, 3, 3), f"{layer}._layer.bias": rand(b)}
                continue
            count = 9 * a * b + b
            state |= {f"{layer}._hypernet.weight": rand(count, 10), f"{layer}._hypernet.bias": rand(count)}
            for mixer in ("mixer", "mixer2"):
                state |= {f"{layer}.{mixer}.weight": rand(10, 10), f"{layer}.{mixer}.bias": rand(10)}
    args = argparse.Namespace(
        data="cifar10" if shape[0] == 3 else "mnist", imagesize=shape[1], dims=", ".join(map(str, dims)),
        strides="1, 1, 1, 1", num_blocks=blocks, layer_type=kind, alpha=1e-6, train_T=True, time_length=1.0,
        nonlinearity="softplus", residual=False, rademacher=True, multiscale=True, solver="dopri5", atol=1e-5, rtol=1e-5,
        test_solver=None, step_size=None, aug_depth=1, run=0,
    )  # fmt: skip
    return {"args": args, "state_dict": state, "optim_state_dict": {"step": 1}}


def released_chain(content, x, kind, blocks, steps):
    """The released forward map by Euler's method, literally: [z*; z] of image shape through every block."""
    state = content["state_dict"]
    shape = tuple(x.shape[1:])
    logit = 1e-6 + (1 - 2e-6) * x
    z, a, scale, last, outputs = logit.log() - (1 - logit).log(), None, -1, None, []
    for (s, k), (c, h, w) in block_shapes(shape, blocks):
        if s != scale:
            if scale >= 0:
                outputs.append(z[:, z.shape[1] // 2 :].flatten(1))
                z = z[:, : z.shape[1] // 2]
            scale, a = s, x.new_zeros(1, c, h, w)
        elif k == blocks + 1:
            a, z = F.pixel_unshuffle(a, 2), F.pixel_unshuffle(z, 2)
        assert z.shape[1:] == a.shape[1:] == (c, h, w)
        p = substate(state, f"transforms.{s}.chain.{k}.odefunc.odefunc.diffeq.")
        for _ in range(steps):
            y, u = torch.cat([torch.zeros_like(z), z], 1), a.flatten()
            last = max(int(name.split(".")[1]) for name in p if name.startswith("layers"))
            for j in range(last + 1):
                if kind == "concat":
                    y = F.conv2d(y, p[f"layers.{j}._layer.weight"], p[f"layers.{j}._layer.bias"], padding=1)
                else:
                    theta = F.linear(u[:10], p[f"layers.{j}._hypernet.weight"], p[f"layers.{j}._hypernet.bias"])
                    n, out = y.shape[1], next(o for o in range(1, len(theta)) if o * (9 * y.shape[1] + 1) == len(theta))
                    y = F.conv2d(y, theta[: 9 * n * out].reshape(out, n, 3, 3), theta[:out], padding=1)
                y = F.softplus(y) if j < last else y
            h1 = torch.tanh(F.linear(u[:20], p["aug_cnn.fc1.weight"], p["aug_cnn.fc1.bias"]))
            du = F.pad(F.linear(h1, p["aug_cnn.fc2.weight"], p["aug_cnn.fc2.bias"]), (0, a.numel() - 20))
            z, a = z + (y[:, 1:] if c == 1 else y[:, :c]) / steps, a + du.reshape(a.shape) / steps
    return torch.cat([*outputs, z.flatten(1)], 1)


@pytest.mark.parametrize("kind", ["concat", "hyper"])
@pytest.mark.parametrize(("shape", "blocks"), [((1, 16, 16), 1), ((3, 8, 8), 2)])
def test_a_checkpoint_is_the_released_function(kind, shape, blocks):
    content = make(shape, (3, 4), kind, blocks)
    flow = load_reference(content)
    for block in flow.blocks:
        block.eval_solver = FixedGrid("euler", 3)
    x = torch.rand(2, *shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    # torch's softplus is x itself above 20, which is off by e^-20 there; ours is not
    close(flow.encode(x), released_chain(content, x, kind, blocks, 3), 1e-10)
    assert flow.levels == 256 and not flow.training
    assert all(b.divergence.distribution == "rademacher" and b.learn_end_time for b in flow.blocks)


def test_stacks_begin_each_block_afresh():
    """--multiscale False: z* starts at zero in every block (a "pit stop"), and strides count."""
    content = make((3, 4, 4), (3, 4), "hyper")
    one = {k.removeprefix("transforms.0.chain.0."): v for k, v in content["state_dict"].items()}
    content["state_dict"] = {f"chain.{k}.{name}": v.clone() for k in (0, 1) for name, v in one.items()}
    content["args"].num_blocks, content["args"].strides = 2, "1, 1, 1"
    flow = load_reference(content)
    assert [type(m).__name__ for m in flow.transform.transforms] == ["Dequantize", "Logit", "CNF", "CNF"]
    for block in flow.blocks:
        block.eval_solver = FixedGrid("euler", 2)
    x = torch.rand(2, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    single = {"state_dict": {f"transforms.0.chain.0.{name}": v for name, v in one.items()}}
    z = released_chain(single, x, "hyper", 1, 2).unflatten(1, (3, 4, 4))
    again = torch.sigmoid(z).sub(1e-6).div(1 - 2e-6)
    close(flow.encode(x).flatten(1), released_chain(single, again, "hyper", 1, 2), 1e-9)
    small = make((1, 4, 4), (3,), "hyper")
    with pytest.raises(CheckpointError, match="images must have at least 20 entries"):
        load_reference(small)


@pytest.mark.parametrize(("shape", "kind", "published"), [
    ((1, 28, 28), "concat", 417_629),
    ((1, 28, 28), "hyper", 4_556_169),
    ((3, 32, 32), "concat", 820_815),
    ((3, 32, 32), "hyper", 8_976_115),
])  # fmt: skip
def test_published_counts(shape, kind, published):
    """The released state holds what the paper counts; what cannot reach the image is left out."""
    content = make(shape, (64, 64, 64), kind, dtype=torch.float32, scale=0.02)
    state = {k: v for k, v in content["state_dict"].items() if not k.endswith("_num_evals")}
    assert sum(v.numel() for v in state.values()) == published
    flow = load_reference(content)
    channels = [block.field.time_layers[0].map.inputs for block in flow.blocks]
    halves = sum(9 * 64 * c + (9 * 64 + 1) * c for c in channels)  # weights on zeros, outputs that are dropped
    if kind == "concat":
        dead = halves + 842 * len(channels)  # and all of g
    else:
        dead = 11 * halves + (4 * 220 + 2) * len(channels)  # and mixers and the 1x1 convolution
    assert sum(p.numel() for p in flow.parameters()) == published - dead


@pytest.mark.parametrize("kind", ["concat", "hyper"])
def test_a_fresh_load_samples_and_inverts(kind, tmp_path):
    """The released code needs an earlier forward pass to sample; nothing is remembered here."""
    content = make((1, 8, 8), (3,), kind, scale=0.15)
    file = tmp_path / "checkpt.pth"
    torch.save(content, file)
    flow, fresh = load_reference(file), load_reference(file)
    for block in (*flow.blocks, *fresh.blocks):
        block.eval_solver = Adaptive("dopri5", 1e-7, 1e-7)
    x = torch.rand(3, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    out = flow.evaluate(x, Request(noise=Noise(0)))
    back = flow.transform.inverse(out.value, Request(noise=Noise(0)))
    assert torch.allclose(back.value, x, atol=1e-6) and torch.allclose(back.log_det, -out.log_det, atol=1e-5)
    assert torch.equal(flow.sample(4, noise=Noise(2)), fresh.sample(4, noise=Noise(2)))
    # the log-det is that of the whole map, though z* is carried beside it
    for block in flow.blocks:
        block.divergence, block.eval_solver = Exact(closed_form=False), FixedGrid("dopri5", 8)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v[None])[0], x[0], vectorize=True)
    with torch.no_grad():
        exact = flow.evaluate(x[:1]).log_det[0]
    assert abs(float(torch.linalg.slogdet(jacobian.reshape(64, 64))[1] - exact)) < 1e-6


@pytest.mark.parametrize(("kind", "change", "match"), [
    ("hyper", {"layers.0._hypernet.weight": (40, 10)}, r"block 0\.0, layer 0: _hypernet.weight has shape \(40, 10\)"),
    ("hyper", {"layers.0._hypernet.bias": None}, "_hypernet.bias is missing"),
    ("hyper", {"layers.0._hyper.weight": (2, 2)}, "belong to no layer type"),
    ("hyper", {"layers.1._hyper.weight": (2, 2)}, "layer 1: _hyper.weight has shape"),
    ("hyper", {"aug_cnn.fc2.weight": (20, 10)}, "aug_cnn: fc2.weight has shape"),
    ("hyper", {"aug_cnn.fc1.bias": None}, "aug_cnn: fc1.bias is missing"),
    ("hyper", {"aug_cnn.fc3.bias": (20,)}, "no counterpart"),
    ("concat", {"aug_cnn.fc1.bias": (5,)}, "aug_cnn: fc1.bias has shape"),
    ("concat", {"layers.1._layer.bias": (3,)}, "layer 1: _layer.bias has shape|belong to no layer"),
    ("concat", {"layers.0._layer.weight": (3, 1, 3, 3)}, "layer 0: _layer.weight has shape"),
    ("concat", {"models.1.layers.0._layer.weight": (3, 1, 3, 3)}, "parallel model"),
])  # fmt: skip
def test_damaged_checkpoints(kind, change, match):
    content = make((1, 8, 8), (3,), kind)
    for name, shape in change.items():
        key = f"transforms.0.chain.0.odefunc.odefunc.diffeq.{name}"
        content["state_dict"].pop(key, None)
        if shape is not None:
            content["state_dict"][key] = torch.zeros(shape, dtype=F64)
    with pytest.raises(CheckpointError, match=match):
        load_reference(content)


@pytest.mark.parametrize(("args", "match"), [
    ({"residual": True}, "residual is True"),
    ({"dims": "4"}, "has shape"),
    ({"dims": "3, 3"}, "gives 3 layers"),
    ({"num_blocks": 2}, "blocks"),
    ({"data": "cifar10"}, "has shape"),
    ({"imagesize": 16}, "give 5 blocks, but the checkpoint has 3"),
    ({"train_T": False, "time_length": 2.0}, "time_length"),
])  # fmt: skip
def test_arguments_that_do_not_fit(args, match):
    with pytest.raises(CheckpointError, match=match):
        load_reference(make((1, 8, 8), (3,), "hyper"), args)


def test_a_block_without_augmented_time():
    content = make((1, 8, 8), (3,), "concat")
    for key in [k for k in content["state_dict"] if "transforms.1" in k and "aug_cnn" in k]:
        del content["state_dict"][key]
    with pytest.raises(CheckpointError, match=r"block 1\.0, layer 0, aug_cnn: fc1\.bias is missing"):
        load_reference(content)
