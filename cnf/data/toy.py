"""Two-dimensional toy densities: FFJORD's (arXiv 1810.01367), AFFJORD's hash (arXiv 2306.02731), and letters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cnf._utils.errors import ConfigError, DataError
from cnf.data.rows import Array
from cnf.data.splits import DataSplits, Options, assemble

__all__ = ["ENTROPY", "NAMES", "TOYS", "load_toy", "sample"]

Sampler = Callable[[int, np.random.Generator], Array]


def _8gaussians(n: int, rng: np.random.Generator) -> Array:
    angle = rng.integers(0, 8, n) * (np.pi / 4)
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (centre + 0.5 * rng.standard_normal((n, 2))) / 1.414


def _2spirals(n: int, rng: np.random.Generator) -> Array:
    turn = np.sqrt(rng.random(n)) * 540 * (2 * np.pi) / 360
    arm = np.stack([-np.cos(turn) * turn, np.sin(turn) * turn], 1) + 0.5 * rng.random((n, 2))
    sign = np.where(rng.random(n) < 0.5, 1.0, -1.0)[:, None]
    return sign * arm / 3 + 0.1 * rng.standard_normal((n, 2))


def _checkerboard(n: int, rng: np.random.Generator) -> Array:
    x = rng.random(n) * 4 - 2
    y = rng.random(n) - 2.0 * rng.integers(0, 2, n) + np.floor(x) % 2
    return np.stack([2 * x, 2 * y], 1)


def _rings(n: int, rng: np.random.Generator) -> Array:
    radius = 0.25 * rng.integers(1, 5, n)
    angle = 2 * np.pi * rng.random(n)
    points: Array = 3 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return points + 0.08 * rng.standard_normal((n, 2))


def _moons(n: int, rng: np.random.Generator) -> Array:
    from sklearn.datasets import make_moons  # type: ignore[import-untyped]

    x = make_moons(n, noise=0.1, random_state=int(rng.integers(2**31)))[0]
    return np.asarray(x * 2 + np.array([-1.0, -0.2]))


def _circles(n: int, rng: np.random.Generator) -> Array:
    from sklearn.datasets import make_circles

    return np.asarray(make_circles(n, factor=0.5, noise=0.08, random_state=int(rng.integers(2**31)))[0] * 3)


def _swissroll(n: int, rng: np.random.Generator) -> Array:
    from sklearn.datasets import make_swiss_roll

    return np.asarray(make_swiss_roll(n, noise=1.0, random_state=int(rng.integers(2**31)))[0][:, [0, 2]] / 5)


def _pinwheel(n: int, rng: np.random.Generator) -> Array:
    arm = rng.integers(0, 5, n)
    features = rng.standard_normal((n, 2)) * np.array([0.3, 0.1]) + np.array([1.0, 0.0])
    angle = arm * 2 * np.pi / 5 + 0.25 * np.exp(features[:, 0])
    c, s = np.cos(angle), np.sin(angle)
    # the released code multiplies row vectors by the rotation matrix, which turns clockwise
    return 2 * np.stack([features[:, 0] * c + features[:, 1] * s, features[:, 1] * c - features[:, 0] * s], 1)


def _hash(n: int, rng: np.random.Generator) -> Array:
    # nine components of equal mass: four bars 0.1 wide and 2.5 long, five Gaussians of variance 0.02 (2306.02731)
    part = rng.integers(0, 9, n)
    along = 2.5 * (rng.random(n) - 0.5)
    across = np.where(part % 2 == 0, 1.0, -1.0) * (0.4 + 0.1 * rng.random(n))
    bar = np.where((part < 2)[:, None], np.stack([across, along], 1), np.stack([along, across], 1))
    centres = 1.25 * np.array([[0, 0], [1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=float)
    blob = centres[np.clip(part - 4, 0, 4)] + np.sqrt(0.02) * rng.standard_normal((n, 2))
    return np.where((part < 4)[:, None], bar, blob)


# H and L, each bar (left, right, bottom, top), and three Gaussians between them
_BARS = np.array(
    [(-1.5, -1.3, -0.8, 0.8), (-0.7, -0.5, -0.8, 0.8), (-1.3, -0.7, -0.1, 0.1), (0.5, 0.7, -0.8, 0.8), (0.7, 1.5, -0.8, -0.6)]
)
_BLOBS = np.array([(0.0, 0.0), (1.2, 0.5), (-1.0, 1.3)])


def _letters(n: int, rng: np.random.Generator) -> Array:
    # eight components of equal mass: the letters' five bars, three Gaussians of standard deviation 0.12
    part = rng.integers(0, 8, n)
    left, right, bottom, top = _BARS[np.minimum(part, 4)].T
    bar = np.stack([left, bottom], 1) + np.stack([right - left, top - bottom], 1) * rng.random((n, 2))
    blob = _BLOBS[np.clip(part - 5, 0, 2)] + 0.12 * rng.standard_normal((n, 2))
    return np.where((part < 5)[:, None], bar, blob)


def _line(n: int, rng: np.random.Generator) -> Array:
    x = rng.random(n) * 5 - 2.5
    return np.stack([x, x + 0.1 * rng.standard_normal(n)], 1)


def _cos(n: int, rng: np.random.Generator) -> Array:
    x = rng.random(n) * 5 - 2.5
    return np.stack([x, np.sin(x) * 2.5 + 0.1 * rng.standard_normal(n)], 1)


_SETS: dict[str, tuple[Sampler, str]] = {
    "8gaussians": (_8gaussians, "2-D: eight Gaussians on a circle"),
    "2spirals": (_2spirals, "2-D: two intertwined spirals"),
    "checkerboard": (_checkerboard, "2-D: uniform on eight squares"),
    "rings": (_rings, "2-D: four concentric rings"),
    "moons": (_moons, "2-D: two half moons"),
    "circles": (_circles, "2-D: two concentric circles"),
    "pinwheel": (_pinwheel, "2-D: five bent arms"),
    "swissroll": (_swissroll, "2-D: one spiral"),
    "hash-gaussian": (_hash, "2-D: four crossing bars and five Gaussians"),
    "letters-gaussian": (_letters, "2-D: the letters H and L and three Gaussians"),
    "line": (_line, "2-D: a straight line with noise"),
    "cos": (_cos, "2-D: a sine wave with noise"),
}
TOYS = {name: sampler for name, (sampler, _) in _SETS.items()}
NAMES = {name: line for name, (_, line) in _SETS.items()}

_WAVE = float(np.log(5.0) + 0.5 * np.log(2 * np.pi * np.e * 0.1**2))

# Differential entropies in nats. The first three are exact; the others are quadratures of -p ln p on fine grids, with p
# the exact density (a finite mixture, or a curve convolved with its noise), accurate to the last digit. The pinwheel's
# density has no simple form.
ENTROPY = {
    "checkerboard": float(np.log(32.0)),
    "line": _WAVE,
    "cos": _WAVE,
    "8gaussians": 2.8319,
    "2spirals": 2.6454,
    "rings": 2.6232,
    "moons": 2.3939,
    "circles": 3.2681,
    "swissroll": 2.6696,
    "hash-gaussian": 0.9545,
    "letters-gaussian": 0.6320,
}


def sample(name: str, n: int, seed: int | np.random.Generator = 0) -> NDArray[np.float32]:
    """Draw exactly ``n`` samples of a toy set, float32 (n, 2).

    Scales are FFJORD's. Two differences from its released code: the rings' angles are random instead of evenly spaced,
    and ``line`` and ``cos`` have Gaussian noise of 0.1 in y, because a curve without width has no density. The nine
    components of ``hash-gaussian`` have equal mass.

    Args:
        name: a key of :data:`TOYS`.
        n: number of samples.
        seed: seed or NumPy generator.

    Raises:
        DataError: for an unknown name.
        ConfigError: for a negative ``n``.

    Example:
        >>> sample("checkerboard", 5).shape
        (5, 2)
    """
    if name not in TOYS:
        raise DataError(f"name must be one of {', '.join(TOYS)}, got {name!r}")
    if n < 0:
        raise ConfigError(f"n must be at least 0, got {n}")
    points = TOYS[name](n, np.random.default_rng(seed)) if n else np.zeros((0, 2))
    return points.astype(np.float32)


def load_toy(name: str, options: Options) -> DataSplits:
    """Load a toy set, drawn once with ``options.seed``; each split has its own generator."""
    parts = [sample(name, n, np.random.default_rng([options.seed, 0, i])) for i, n in enumerate(options.sizes)]
    notice = f"drawn once by seed {options.seed}"
    return assemble(name, "toy", parts, options, columns=("x", "y"), entropy=ENTROPY.get(name), notices=[notice])
