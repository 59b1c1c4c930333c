"""Two-dimensional toy densities at FFJORD's scales (1810.01367), AFFJORD's hash, and the density of a grey picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnf.datasets.splits import DataSplits
from cnf.errors import DataError

__all__ = ["ENTROPY", "TOYS", "load_picture", "load_toy", "sample"]

Array = np.ndarray
Sampler = Callable[[int, np.random.Generator], Array]


def _8gaussians(n: int, rng: np.random.Generator) -> Array:
    angle = rng.integers(0, 8, n) * (np.pi / 4)
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.asarray((centre + 0.5 * rng.standard_normal((n, 2))) / 1.414)


def _2spirals(n: int, rng: np.random.Generator) -> Array:
    turn = np.sqrt(rng.random(n)) * 540 * (2 * np.pi) / 360
    arm = np.stack([-np.cos(turn) * turn, np.sin(turn) * turn], 1) + 0.5 * rng.random((n, 2))
    sign = np.where(rng.random(n) < 0.5, 1.0, -1.0)[:, None]
    return sign * arm / 3 + 0.1 * rng.standard_normal((n, 2))


def _checkerboard(n: int, rng: np.random.Generator) -> Array:
    x = rng.random(n) * 4 - 2
    y = rng.random(n) - 2.0 * rng.integers(0, 2, n) + np.floor(x) % 2
    return 2 * np.stack([x, y], 1)


def _rings(n: int, rng: np.random.Generator) -> Array:
    radius = 0.25 * rng.integers(1, 5, n)
    angle = 2 * np.pi * rng.random(n)
    points = 3 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return points + 0.08 * rng.standard_normal((n, 2))


def _moons(n: int, rng: np.random.Generator) -> Array:
    from sklearn.datasets import make_moons

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
    return 2 * np.stack([features[:, 0] * c - features[:, 1] * s, features[:, 0] * s + features[:, 1] * c], 1)


def _hash(n: int, rng: np.random.Generator) -> Array:
    # nine components of equal mass: four bars 0.1 wide and 2.5 long, five Gaussians of variance 0.02 (2306.02731)
    part = rng.integers(0, 9, n)
    along = 2.5 * (rng.random(n) - 0.5)
    across = np.where(part % 2 == 0, 1.0, -1.0) * (0.4 + 0.1 * rng.random(n))
    bar = np.where((part < 2)[:, None], np.stack([across, along], 1), np.stack([along, across], 1))
    centres = 1.25 * np.array([[0, 0], [1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=float)
    blob = centres[np.clip(part - 4, 0, 4)] + np.sqrt(0.02) * rng.standard_normal((n, 2))
    return np.where((part < 4)[:, None], bar, blob)


def _line(n: int, rng: np.random.Generator) -> Array:
    x = rng.random(n) * 5 - 2.5
    return np.stack([x, x + rng.standard_normal(n)], 1)


def _cos(n: int, rng: np.random.Generator) -> Array:
    x = rng.random(n) * 5 - 2.5
    return np.stack([x, np.sin(x) * 2.5 + rng.standard_normal(n)], 1)


TOYS: dict[str, Sampler] = {
    "8gaussians": _8gaussians,
    "2spirals": _2spirals,
    "checkerboard": _checkerboard,
    "rings": _rings,
    "moons": _moons,
    "circles": _circles,
    "pinwheel": _pinwheel,
    "swissroll": _swissroll,
    "hash-gaussian": _hash,
    "line": _line,
    "cos": _cos,
}

# Differential entropies in nats: 32 units of area; a uniform of width 5 beside a standard normal; and, for the eight
# Gaussians, quadrature of -p ln p on a fine grid (the test does it again).
ENTROPY = {
    "checkerboard": float(np.log(32.0)),
    "line": float(np.log(5.0) + 0.5 * np.log(2 * np.pi * np.e)),
    "cos": float(np.log(5.0) + 0.5 * np.log(2 * np.pi * np.e)),
    "8gaussians": 2.8317,
}


def sample(name: str, n: int, seed: int = 0) -> Array:
    """n points of a toy set, (n, 2) float32, by seed.

    Example:
        >>> sample("checkerboard", 5).shape
        (5, 2)
    """
    if name not in TOYS:
        raise DataError(f"toy set {name!r} is unknown: expected one of {', '.join(TOYS)}")
    return np.asarray(TOYS[name](n, np.random.default_rng(seed)), dtype=np.float32)


def _splits(name: str, draw: Sampler, seed: int, limit: int | None, entropy: float | None, *notes: str) -> DataSplits:
    sizes = (min(50_000, limit or 50_000), 5_000, 10_000)
    parts = [torch.from_numpy(draw(n, np.random.default_rng([seed, i])).astype(np.float32)) for i, n in enumerate(sizes)]
    note = f"drawn by split seed {seed}: {sizes[0]:,} training, {sizes[1]:,} validation and {sizes[2]:,} test points"
    return DataSplits(name, "toy", parts[0], parts[1], parts[2], columns=("x", "y"), entropy=entropy, notices=(note, *notes))


def load_toy(name: str, seed: int, limit: int | None) -> DataSplits:
    """A toy set, drawn once by seed."""
    return _splits(name, TOYS[name], seed, limit, ENTROPY.get(name))


def load_picture(path: Path, seed: int, limit: int | None) -> DataSplits:
    """The density of a grey picture: dark is dense, the longer side spans [-4, 4], uniform jitter within a pixel.

    Raises:
        DataError: for a file that is no picture, or one without any dark pixel.
    """
    try:
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"), dtype=np.float64)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from None
    mass = (255 - grey).ravel()
    if mass.sum() == 0:
        raise DataError(f"{path} is all white: dark pixels carry the density, so there is none")
    height, width = grey.shape
    scale = 8 / max(height, width)

    def draw(n: int, rng: np.random.Generator) -> Array:
        pixel = rng.choice(mass.size, size=n, p=mass / mass.sum())
        u = rng.random((n, 2))
        column, row = pixel % width + u[:, 0], pixel // width + u[:, 1]
        return np.stack([(column - width / 2) * scale, (height / 2 - row) * scale], 1)

    return _splits(path.stem, draw, seed, limit, None, f"the density of {path.name}: dark is dense, span [-4, 4]")
