"""Supervised toy sets: flip and concentric spheres of ANODE (arXiv 1904.01681), and two sets of three spheres."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.splits import Array, DataSplits, Options, assemble

__all__ = ["CLASSES", "NAMES", "load_supervised", "sample_supervised", "shell"]

NAMES = {
    "flip": "1-D regression: points at -1 and 1, to be carried to 1 and -1 (ANODE)",
    "spheres1": "1-D regression: |x| below 1/2 to -1, between 1 and 3/2 to +1 (ANODE)",
    "spheres2": "2-D regression: a disc to -1, a ring around it to +1 (ANODE)",
    "three-spheres": "2-D, three classes: a disc and two rings around it",
    "disjoint-spheres": "2-D, three classes: two disjoint discs inside a ring",
}
CLASSES = {"three-spheres": ("inner", "middle", "outer"), "disjoint-spheres": ("left", "right", "outer")}
FLIP_NOISE = 0.1  # standard deviation around -1 and 1; without noise the set is two points
RADII = (0.5, 1.0, 1.5)  # outer radius of the ball, inner and outer radius of the shell


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


def _flip(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    side = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)[:, None]
    return side + FLIP_NOISE * rng.standard_normal((n, 1)), -side


def _spheres(dim: int) -> Callable[[int, np.random.Generator], tuple[Array, Array]]:
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


_DRAWS: dict[str, Callable[[int, np.random.Generator], tuple[Array, Array]]] = {
    "flip": _flip,
    "spheres1": _spheres(1),
    "spheres2": _spheres(2),
    "three-spheres": _three,
    "disjoint-spheres": _disjoint,
}


def sample_supervised(name: str, n: int, seed: int | np.random.Generator = 0) -> tuple[Array, Array]:
    """Draw ``n`` samples, float32 (n, D), and targets, float32 (n, 1), or class indices (n,) for :data:`CLASSES`.

    * ``flip``: half at 1, half at -1, with Gaussian noise of 0.1; the targets are -1 and 1.
    * ``spheres1``, ``spheres2``: a third uniform in |x| <= 1/2 with target -1, the rest uniform in 1 <= |x| <= 3/2
      with target 1.
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
    if name not in _DRAWS:
        raise DataError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if n < 3:
        raise ConfigError(f"n must be at least 3, got {n}")
    x, y = _DRAWS[name](n, np.random.default_rng(seed))
    return x.astype(np.float32), y.astype(np.float32) if y.ndim == 2 else y.astype(np.int64)


def load_supervised(name: str, options: Options) -> DataSplits:
    """Load a set of :data:`NAMES`, drawn once with ``options.seed``; each split has its own generator.

    Raises:
        ConfigError: for a ``condition`` other than ``"target"`` for a set with targets.
    """
    classes = CLASSES.get(name, ())
    if not classes and options.condition != "target":
        raise ConfigError(f"{name!r} has regression targets: set condition='target' (--objective regression, as the preset anode-{name.rstrip('12')} does)")
    drawn = [sample_supervised(name, n, np.random.default_rng([options.seed, 1, i])) for i, n in enumerate(options.sizes)]
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    outputs = {"codes": ys, "classes": classes} if classes else {"targets": ys}
    notices = [f"drawn once by seed {options.seed}"]
    return assemble(name, "toy", xs, options, **outputs, columns=("x", "y")[: xs[0].shape[1]], notices=notices)
