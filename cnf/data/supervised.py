"""Supervised toy sets: those of ANODE (arXiv 1904.01681), and two sets of three spheres."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.splits import Array, DataSplits, Options, assemble

__all__ = ["CLASSES", "NAMES", "family", "in_slice", "load_supervised", "sample_supervised", "shell"]

NAMES = {
    "identity": "1-D regression: points at -1 and 1, to stay there (ANODE)",
    "flip": "1-D regression: points at -1 and 1, to be carried to 1 and -1 (ANODE)",
    "spheres1": "1-D regression: |x| below 1/2 to -1, between 1 and 3/2 to +1 (ANODE)",
    "spheres2": "2-D regression: a disc to -1, a ring around it to +1 (ANODE)",
    "spheres3": "3-D regression: a ball to -1, a shell around it to +1; spheres4, spheres5, ... up to spheres1000",
    "separable2": "2-D regression: a disc on the left to -1, one on the right to +1",
    "shifted-sines": "2-D regression: two sine curves, the upper to +1, the lower to -1 (ANODE's code)",
    "three-spheres": "2-D, three classes: a disc and two rings around it",
    "disjoint-spheres": "2-D, three classes: two disjoint discs inside a ring",
}
CLASSES = {"three-spheres": ("inner", "middle", "outer"), "disjoint-spheres": ("left", "right", "outer")}
FLIP_NOISE = 0.1  # standard deviation around -1 and 1; without noise the set is two points
RADII = (0.5, 1.0, 1.5)  # outer radius of the ball, inner and outer radius of the shell
SHIFT, SINE_NOISE = 1.0, 0.1  # distance of the two sine curves, and the standard deviation around each
Draw = Callable[[int, np.random.Generator], tuple[Array, Array]]


def family(name: str) -> str:
    """Return the entry of :data:`NAMES` that a name belongs to: that of ``spheres7`` is ``spheres3``.

    Example:
        >>> family("spheres7"), family("spheres2"), family("flip")
        ('spheres3', 'spheres2', 'flip')
    """
    return "spheres3" if re.fullmatch(r"spheres([3-9]|[1-9]\d{1,2}|1000)", name) else name


def shell(n: int, dim: int, inner: float, outer: float, rng: np.random.Generator) -> Array:
    """Draw ``n`` samples uniformly in the ball (inner = 0) or the shell inner <= |x| <= outer, (n, dim).

    The volume within r grows as r**dim, so r**dim is drawn uniformly; the released code is uniform for inner = 0 only.

    Example:
        >>> x = shell(1000, 3, 1.0, 1.5, np.random.default_rng(0))
        >>> bool((np.linalg.norm(x, axis=1) >= 1).all())
        True
    """
    direction = rng.standard_normal((n, dim))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    power = inner**dim + rng.random((n, 1)) * (outer**dim - inner**dim)
    radius: Array = power ** (1 / dim)
    return radius * direction


def _line(sign: float) -> Draw:
    def draw(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        side = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)[:, None]
        return side + FLIP_NOISE * rng.standard_normal((n, 1)), sign * side

    return draw


def _separable(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    side = np.repeat([-1.0, 1.0], [n // 2, n - n // 2])[:, None]
    return shell(n, 2, 0.0, 0.5, rng) + side * [1.0, 0.0], side


def _sines(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    side = np.repeat([1.0, -1.0], [n // 2, n - n // 2])[:, None]
    first = 2 * rng.random((n, 1)) - 1
    second = np.sin(np.pi * first) + SINE_NOISE * rng.standard_normal((n, 1)) + SHIFT / 2 * side
    return np.concatenate([first, second], 1), side


def _spheres(dim: int) -> Draw:
    def draw(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        inside = n // 3  # 1,000 of 3,000
        first, second, third = RADII
        x = np.concatenate([shell(inside, dim, 0.0, first, rng), shell(n - inside, dim, second, third, rng)])
        return x, np.concatenate([-np.ones((inside, 1)), np.ones((n - inside, 1))])

    return draw


def _thirds(n: int) -> list[int]:
    return [n // 3 + (k < n % 3) for k in range(3)]


def _three(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    counts = _thirds(n)
    x = np.concatenate([shell(m, 2, k, k + 0.5, rng) for k, m in enumerate(counts)])
    return x, np.repeat(np.arange(3), counts)


def _disjoint(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    counts = _thirds(n)
    left, right = (shell(m, 2, 0.0, 0.5, rng) + [centre, 0.0] for m, centre in zip(counts, (-1.0, 1.0), strict=False))
    return np.concatenate([left, right, shell(counts[2], 2, 2.0, 2.5, rng)]), np.repeat(np.arange(3), counts)


_DRAWS: dict[str, Draw] = {
    "identity": _line(1.0),
    "flip": _line(-1.0),
    "separable2": _separable,
    "shifted-sines": _sines,
    "three-spheres": _three,
    "disjoint-spheres": _disjoint,
}


def sample_supervised(name: str, n: int, seed: int | np.random.Generator = 0) -> tuple[Array, Array]:
    """Draw ``n`` samples, float32 (n, D), and targets, float32 (n, 1), or class indices (n,) for :data:`CLASSES`.

    * ``identity``, ``flip``: half at 1, half at -1, with Gaussian noise of 0.1; the targets are 1 and -1, or -1 and 1.
    * ``spheres1``, ``spheres2``, ... ``spheres1000``: points in that many dimensions, a third uniform in |x| <= 1/2
      with target -1, the rest uniform in 1 <= |x| <= 3/2 with target 1.
    * ``separable2``: half each, uniform in the discs of radius 1/2 around (-1, 0) and (1, 0), with targets -1 and 1.
    * ``shifted-sines``: half each on the curves sin(pi x) + 1/2 and sin(pi x) - 1/2, -1 <= x <= 1, with Gaussian noise
      of 0.1 in the second coordinate; the targets are 1 and -1.
    * ``three-spheres``: a third each, uniform in k <= |x| <= k + 1/2 for the classes k = 0, 1, 2.
    * ``disjoint-spheres``: a third each, uniform in the discs of radius 1/2 around (-1, 0) and (1, 0), classes 0 and 1,
      and in 2 <= |x| <= 5/2, class 2.

    Raises:
        DataError: for an unknown name.
        ConfigError: for fewer than three samples.

    Example:
        >>> x, y = sample_supervised("spheres2", 3000)
        >>> x.shape, y.shape, int((y < 0).sum())
        ((3000, 2), (3000, 1), 1000)
    """
    if family(name) not in NAMES:
        raise DataError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if n < 3:
        raise ConfigError(f"n must be at least 3, got {n}")
    draw = _DRAWS.get(name) or _spheres(int(name.removeprefix("spheres")))
    x, y = draw(n, np.random.default_rng(seed))
    return x.astype(np.float32), y.astype(np.float32) if y.ndim == 2 else y.astype(np.int64)


def in_slice(x: Array, angle: float) -> Array:
    """Return which points (N, D) lie in the slice of ``angle`` degrees around the direction of the first coordinate.

    The angle is measured in the plane of the first two coordinates.

    Example:
        >>> in_slice(np.array([[1.0, 0.1], [1.0, -1.1], [-1.0, 0.0]]), 90.0)
        array([ True, False, False])
    """
    inside: Array = np.abs(np.arctan2(x[:, 1], x[:, 0])) < np.radians(angle) / 2
    return inside


def _restricted(name: str, n: int, rng: np.random.Generator, angle: float, inside: bool) -> tuple[Array, Array]:
    """Draw ``n`` samples inside or outside of the slice: all others are rejected."""
    xs, ys, found, size = [], [], 0, max(n, 1000)
    for _ in range(1000):
        x, y = sample_supervised(name, size, rng)
        kept = rng.permutation(np.flatnonzero(in_slice(x, angle) == inside))  # a draw is sorted by class
        xs.append(x[kept])
        ys.append(y[kept])
        found += len(kept)
        if found >= n:
            return np.concatenate(xs)[:n], np.concatenate(ys)[:n]
    raise DataError(f"hold_out_angle={angle:g}: {name!r} has {found} points in 1,000 draws on one side; expected {n}: choose another angle")


def load_supervised(name: str, options: Options) -> DataSplits:
    """Load a set of :data:`NAMES`, drawn once with ``options.seed``; each split has its own generator.

    With ``options.hold_out_angle`` all training points lie outside of :func:`in_slice` and all validation points inside
    of it (ANODE, figure 9); test points are drawn from all angles.

    Raises:
        ConfigError: for a ``condition`` other than ``"target"`` for a set with targets, or a slice of a set on a line.
    """
    classes, angle = CLASSES.get(name, ()), options.hold_out_angle
    if not classes and options.condition != "target":
        suited = "flip" if name in ("identity", "flip") else "spheres"
        raise ConfigError(f"{name!r} has regression targets: set condition='target' (--objective regression, as the preset anode-{suited} does)")
    generators = [np.random.default_rng([options.seed, 1, i]) for i in range(3)]
    drawn = [sample_supervised(name, n, rng) for n, rng in zip(options.sizes, generators, strict=True)]
    notices = [f"drawn once by seed {options.seed}"]
    dim = drawn[0][0].shape[1]
    if angle is not None:
        if dim == 1:
            raise ConfigError(f"hold_out_angle={angle:g} is for points in the plane or more dimensions, and {name!r} has one: leave it out")
        drawn[:2] = [_restricted(name, options.sizes[i], generators[i], angle, i == 1) for i in range(2)]
        notices.append(f"validation within {angle / 2:g} degrees of the first axis, training outside")
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    outputs = {"codes": ys, "classes": classes} if classes else {"targets": ys}
    columns = ("x", "y")[:dim] if dim < 3 else tuple(f"x{i + 1}" for i in range(dim))
    return assemble(name, "toy", xs, options, **outputs, columns=columns, notices=notices)
