"""Noise: a pure function of what it is for; rows of a joint batch; moments, two-sided, with fixed seeds."""

import math
from itertools import combinations

import pytest
import torch

from cnf.errors import ConfigError
from cnf.fields import MLP
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Hutchinson
from cnf.random import Noise, child, draw
from cnf.solvers import FixedGrid
from cnf.transforms import Request, Sequential

KINDS = ("uniform", "normal", "rademacher")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_joint_batch(kind, dtype):
    joint = Noise(3, "train", 7).child(2).draw("e", kind, (12, 5), dtype=dtype)
    assert joint.dtype == dtype
    for sizes in ((12,), (4, 4, 4), (5, 7), (1, 10, 1)):
        start, parts = 0, []
        for size in sizes:
            parts.append(Noise(3, "train", 7, start=start, total=12).child(2).draw("e", kind, (size, 5), dtype=dtype))
            start += size
        assert torch.equal(torch.cat(parts), joint)
    # rows in another dimension, as the probes of several draws have them
    joint = Noise(3).draw("e", kind, (2, 12, 5), dtype=dtype, batch_dim=1)
    parts = [Noise(3, start=s, total=12).draw("e", kind, (2, 4, 5), dtype=dtype, batch_dim=1) for s in (0, 4, 8)]
    assert torch.equal(torch.cat(parts, 1), joint)
    # one draw for the whole batch is the same on every rank
    alike = [Noise(3, start=s, total=12).draw("e", kind, (), dtype=dtype, batch_dim=None) for s in (0, 4)]
    assert torch.equal(*alike)


def test_each_purpose_its_own_numbers():
    sources = [
        Noise(0),
        Noise(1),
        Noise(0, "validation"),
        Noise(0, step=1),
        Noise(0).child(0),
        Noise(0).child(1),
        Noise(0).child(0).child(1),
        Noise(0).child(1).child(0),
        Noise(0).child(0).child(0),
        Noise(0, "train", 10),
    ]
    n = 4096
    draws = [s.draw("probe", "normal", (n,)) for s in sources] + [Noise(0).draw("latent", "normal", (n,))]
    for a, b in combinations(draws, 2):
        assert not torch.equal(a, b)
        assert abs(float((a * b).mean()) * math.sqrt(n)) < 5


def test_order_and_the_global_generator_play_no_part():
    names = ("a", "b", "c")
    first = {name: Noise(0).draw(name, "normal", (5,)) for name in names}
    torch.manual_seed(99)
    noise = Noise(0)
    noise.child(4).draw("a", "uniform", (1000,))
    before = torch.get_rng_state()
    for name in reversed(names):
        assert torch.equal(noise.draw(name, "normal", (5,)), first[name])
        assert torch.equal(noise.draw(name, "normal", (5,)), first[name])
    assert torch.equal(torch.get_rng_state(), before)
    assert noise.path == ()  # a child does not change its parent


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    n = 200_000
    for noise in (Noise(5), None):
        torch.manual_seed(5)
        e = draw(noise, "e", kind, (n,), dtype=torch.float64)
        mean, second, fourth = {"uniform": (1 / 2, 1 / 3, 1 / 5), "normal": (0, 1, 3), "rademacher": (0, 1, 1)}[kind]
        assert abs(float(e.mean()) - mean) < 5 * math.sqrt((second - mean**2) / n)
        assert abs(float(e.square().mean()) - second) <= 5 * math.sqrt((fourth - second**2) / n)
        if kind == "uniform":
            assert bool((e >= 0).all()) and bool((e < 1).all())
        if kind == "rademacher":
            assert sorted(e.unique().tolist()) == [-1.0, 1.0]
        assert abs(float((e[1:] - mean) @ (e[:-1] - mean)) / math.sqrt(n)) < 5 * (second - mean**2)


def test_none_is_the_global_generator():
    torch.manual_seed(0)
    a = draw(None, "e", "normal", (3,))
    torch.manual_seed(0)
    assert torch.equal(a, torch.randn(3))
    assert child(None, 3) is None
    assert child(Noise(0), 3).path == (3,)


def test_replay():
    e, u = torch.randn(4, 2), torch.rand(4, 2)
    noise = Noise.replay({"1/probe": e, "0/1/dequantize": u})
    assert torch.equal(noise.child(1).draw("probe", "normal", (1, 4, 2)), e[None])
    assert torch.equal(noise.child(0).child(1).draw("dequantize", "uniform", (4, 2), dtype=torch.float64), u.double())
    with pytest.raises(ConfigError, match=r"no tensor '2/probe', only \['0/1/dequantize', '1/probe'\]"):
        noise.child(2).draw("probe", "normal", (4, 2))
    for shape in ((2, 4), (8,), (4, 3)):  # as many numbers in another shape do not fit either
        with pytest.raises(ConfigError, match=r"has shape \(4, 2\); expected"):
            noise.child(1).draw("probe", "normal", shape)


def test_refusals():
    with pytest.raises(ConfigError, match="kind='cauchy' is unknown"):
        Noise(0).draw("e", "cauchy", (2,))
    with pytest.raises(ConfigError, match=r"total=5 .*rows 3 to 6"):
        Noise(0, start=3, total=5).draw("e", "normal", (3, 2))
    for start, total in ((-1, 4), (5, 4), (2, None)):
        with pytest.raises(ConfigError, match=f"start={start}, total={total}"):
            Noise(0, start=start, total=total)


def test_repr_shows_what_it_is_for():
    assert repr(Noise(3, "train", 7, start=2, total=9).child(1).child(0)) == "Noise(3, 'train', 7, start=2, total=9).child(1).child(0)"
    assert repr(Noise(0)) == "Noise(0, 'train', 0)"


def test_micro_batches_see_the_joint_batch():
    """Through a chain: probe and random end time of parts of a batch are those of the whole."""
    torch.manual_seed(0)
    chain = Sequential(
        CNF(MLP(3, (6,)), Hutchinson(probes=2), FixedGrid("rk4", 2), end_time=1.0, steer=0.5) for _ in range(2)
    ).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    whole = chain(x, Request(noise=Noise(0, step=4)))
    parts = [chain(x[s : s + 2], Request(noise=Noise(0, step=4, start=s, total=6))) for s in (0, 2, 4)]
    assert torch.allclose(torch.cat([p.value for p in parts]), whole.value, atol=1e-13)
    assert torch.allclose(torch.cat([p.log_det for p in parts]), whole.log_det, atol=1e-13)
    other = chain(x, Request(noise=Noise(0, step=5)))
    assert not torch.allclose(other.value, whole.value, atol=1e-3)  # another end time
    assert not torch.allclose(other.log_det, whole.log_det, atol=1e-3)
    blocks = [b.divergence.probe(x, Noise(0).child(i), frozenset({"div"}), b.field) for i, b in enumerate(chain.transforms)]
    assert not torch.equal(*blocks)
