"""Paths of multiscale flows: frames against images put together entry by entry, the ends, and how straight they are."""

import math

import pytest
import torch
from conftest import F64, perturbed

from cnf.compat.affjord import ENTRIES, squeeze_paths
from cnf.config import FlowConfig, SolverConfig
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, TimePath
from cnf.flow import Flow
from cnf.models import build
from cnf.ode.continuous import CNF
from cnf.ode.multiscale import Multiscale, SharedAugmentedTime, multiscale
from cnf.ode.trajectory import straightness, trajectory
from cnf.random import Noise
from cnf.solvers import FixedGrid
from cnf.transforms import Logit, Request, Sequential, Squeeze, Standardize
from cnf.transforms.request import AugmentedTime

GRID = FixedGrid("dopri5", 12)
LEVELS = 17


def block(shape, drive=None):
    path = None if drive is None else TimePath(drive.k, learn_start=True)
    return CNF(ConvField(shape[0], (3,), drive or "concat"), eval_solver=GRID, path=path)


def images(shape, n=2):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=F64)


def unsqueezed(y):
    """Channel 4c + 2r + s is row r and column s of every square of channel c."""
    n, c, h, w = y.shape
    x = y.new_zeros(n, c // 4, 2 * h, 2 * w)
    for i in range(c):
        x[:, i // 4, (i // 2) % 2 :: 2, i % 2 :: 2] = y[:, i]
    return x


def assembled(y, left):
    """The image of what goes on, y, and of what has left, in the order of the scales; every scale but the last squeezes."""
    for out in reversed(left):
        y = unsqueezed(torch.cat([y, out], 1))
    return y


def latent_image(z, outputs):
    """The image of a flat latent."""
    parts = [part.unflatten(1, shape) for part, shape in zip(z.split([math.prod(s) for s in outputs], 1), outputs, strict=True)]
    return assembled(parts[-1], parts[:-1])


def by_hand(chain, x):
    """The whole images at the beginning and behind every block, and the places of the blocks whose parts are squeezed."""
    frames, left = [x], []
    for i, scale in enumerate(chain.scales):
        a, squeezed = scale.transforms[0].initial_augmented_time(x) if isinstance(scale, SharedAugmentedTime) else None, False
        for part in scale.transforms:
            if isinstance(part, CNF):
                shared = None if a is None else AugmentedTime(part.end_time(x), a)
                x = part(x, Request(log_det=False, augmented_time=shared)).value
                a = None if shared is None else shared.value
                frames.append(assembled(unsqueezed(x) if squeezed else x, left))
            else:
                x, squeezed = part(x).value, True
                a = None if a is None else scale.between(part, a)
        if i + 1 < len(chain.scales):
            x, out = x.chunk(2, 1)
            left.append(out)
    return torch.stack(frames)


CHAINS = {
    "grey": ((1, 8, 8), 1, None),
    "three scales, two blocks": ((1, 16, 16), 2, None),
    "colour": ((3, 8, 8), 1, None),
    "wide": ((2, 8, 12), 2, None),
    "augmented time": ((1, 8, 8), 2, AugmentedTimeConditioning("hyper", k=5, m=3)),
    "augmented time, colour": ((3, 8, 8), 1, AugmentedTimeConditioning("concat", k=4)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHAINS)
def test_every_frame_of_a_multiscale_chain_is_the_whole_image(name):
    shape, blocks, drive = CHAINS[name]
    torch.manual_seed(0)
    chain = perturbed(multiscale(shape, lambda s: block(s, drive), blocks), 0.1).eval()
    count = sum(isinstance(m, CNF) for m in chain.modules())
    x = images(shape) - 0.5
    times = torch.linspace(0, 1, 2 * count + 1, dtype=F64)
    path = trajectory(chain, x, times)
    assert path.shape == (2 * count + 1, *x.shape)
    truth = by_hand(chain, x)
    assert (truth.diff(dim=0).flatten(2).norm(dim=2) > 1e-3).all()  # every block moves something
    assert torch.equal(path[0], x)
    assert torch.allclose(path[::2], truth, rtol=0, atol=1e-8)
    assert torch.allclose(path[-1], latent_image(chain(x).value, chain.outputs), rtol=0, atol=1e-8)
    assert torch.allclose(path[-1].flatten(1).sort(1).values, chain(x).value.sort(1).values, rtol=0, atol=1e-8)
    # the parts that have left stay as they are
    gone = latent_image(torch.cat([torch.full((1, math.prod(s)), float(i), dtype=F64) for i, s in enumerate(chain.outputs)], 1), chain.outputs)
    at = 0
    for i, scale in enumerate(chain.scales):
        at += 2 * sum(isinstance(m, CNF) for m in scale.modules())
        rest = path[at:, :, gone[0] <= i]
        assert torch.equal(rest, rest[:1].expand_as(rest))


@torch.no_grad()
def test_between_the_ends_of_a_block():
    """Halfway through the second block, which lives on the squeezed image, and through the last, when half has left."""
    torch.manual_seed(0)
    chain = perturbed(multiscale((1, 8, 8), block), 0.1).eval()
    first, squeeze, second = chain.scales[0].transforms
    (third,) = chain.scales[1].transforms
    x = images((1, 8, 8)) - 0.5
    path = trajectory(chain, x, torch.tensor([0.5, 5 / 6], dtype=F64))
    half = torch.zeros((), dtype=F64), 0.5 * second.end_time(x)
    y = squeeze(first(x).value).value
    assert torch.allclose(path[0], unsqueezed(second.integrate(y, half)[0]), rtol=0, atol=1e-8)
    on, out = second(y).value.chunk(2, 1)
    assert torch.allclose(path[1], assembled(third.integrate(on, half)[0], [out]), rtol=0, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {}, {"squeeze_first": True}, {"blocks": 2, "preprocess": "standardize"}, {"augmented_time": "hyper"}, {"augmented_time": "concat", "blocks": 2},
    {"architecture": "stack", "squeeze_first": True, "preprocess": "gaussianize"},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_the_ends_of_a_flows_path_are_the_image_and_its_latent(shape, options):
    settings = {"architecture": "multiscale", "field": "conv", "hidden": (3,), "zero_init": False, "preprocess": "logit", "alpha": 0.05}
    torch.manual_seed(0)
    flow = perturbed(build(FlowConfig.of(**settings | options), SolverConfig(), shape, levels=LEVELS, context_dim=2), 0.1).eval()
    flow.fit_statistics(torch.randint(0, LEVELS, (50, *shape), generator=torch.Generator().manual_seed(2), dtype=torch.uint8))
    for one in flow.blocks:
        one.eval_solver = GRID
    pixels = (images(shape) * LEVELS).to(torch.uint8)
    context = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64)
    path = flow.trajectory(pixels, torch.tensor([0.0, 0.37, 1.0]), context, noise=Noise(3))
    assert path.shape == (3, 2, *shape)
    x = pixels
    for i, leaf in enumerate(flow.transform.transforms):
        if isinstance(leaf, Squeeze | Multiscale | CNF):
            break
        x = leaf(x, Request(noise=Noise(3).child(i))).value
    z = flow.encode(pixels, context, noise=Noise(3))
    if "architecture" not in options:
        z = latent_image(z, flow.transform.transforms[-1].outputs)
    assert torch.allclose(path[0], x, rtol=0, atol=1e-12)
    assert torch.allclose(path[-1], unsqueezed(z) if "squeeze_first" in options else z, rtol=0, atol=1e-8)
    # one row has the path that it has alone
    alone = flow.trajectory(pixels[1:], torch.tensor([0.37]), context[1:], noise=Noise(3, start=1, total=2))
    assert torch.allclose(alone[0], path[1, 1:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_released_affjords_path_is_squeezed_with_the_image():
    drive = AugmentedTimeConditioning("hyper", k=ENTRIES, m=10)
    flow = Flow(Sequential([Logit(0.05), multiscale((1, 8, 8), lambda s: block(s, drive), 2)]), (1, 8, 8))
    squeeze_paths(flow)
    flow, x = perturbed(flow, 0.1).eval(), images((1, 8, 8))
    logit, chain = flow.transform.transforms
    path = flow.trajectory(x, torch.linspace(0, 1, 7, dtype=F64))
    assert torch.allclose(path, by_hand(chain, logit(x).value), rtol=0, atol=1e-8)
    assert torch.allclose(path[-1], latent_image(flow.encode(x), chain.outputs), rtol=0, atol=1e-8)


@torch.no_grad()
def test_blocks_before_and_behind_the_scales():
    """Squeezes and a multiscale chain anywhere: a block on the flat latent moves the image's entries in their places."""
    torch.manual_seed(0)
    chain = multiscale((4, 4, 4), block)
    parts = [block((1, 8, 8)), Standardize(torch.zeros(1, 8, 8), torch.full((1, 8, 8), 2.0)), Squeeze(), chain, CNF(MLP(64, (4,)), eval_solver=GRID)]
    flow = perturbed(Flow(Sequential(parts), (1, 8, 8)), 0.1).eval()
    x = images((1, 8, 8))
    count = len(flow.blocks)
    path = flow.trajectory(x, torch.linspace(0, 1, count + 1, dtype=F64))
    first, whiten, squeeze, chain, _ = flow.transform.transforms
    assert torch.allclose(path[1], first(x).value, rtol=0, atol=1e-10)
    y = squeeze(whiten(first(x).value).value).value
    middle = unsqueezed(latent_image(chain(y).value, chain.outputs))
    assert torch.allclose(path[-2], middle, rtol=0, atol=1e-8)
    assert torch.allclose(path[-1], unsqueezed(latent_image(flow.encode(x), chain.outputs)), rtol=0, atol=1e-8)


def test_straightness_of_a_path_that_turns():
    """Four blocks, each of which moves all that is left by one: half of the entries stop in the middle of [0, 1]."""

    class One(torch.nn.Module):
        def forward(self, t, x, context=None):
            return torch.ones_like(x)

    blocks = [CNF(One(), eval_solver=FixedGrid("rk4", 1)) for _ in range(4)]
    chain = Multiscale([Sequential([blocks[0], Squeeze(), blocks[1]]), Sequential(blocks[2:])], (1, 4, 4)).eval()
    found = straightness(chain, images((1, 4, 4)))
    assert found.ratio == pytest.approx(math.sqrt(10) / (2 + math.sqrt(2)), rel=1e-6)
    assert found.kinetic == pytest.approx(16 * (1 / 2 + 1 / 2 * 1 / 2), rel=1e-6)
