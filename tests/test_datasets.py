"""Toy sets and pictures against independent truth, tables and their lattices, and every bad input's message."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same_rows, shared
from PIL import Image
from scipy.special import i0e, logsumexp, ndtr

from cnf import data as datasets
from cnf.data import toy
from cnf.data.lattice import lattice_step
from cnf.data.pictures import PictureDensity
from cnf.errors import ConfigError, DataError

F32 = float(np.finfo(np.float32).eps)


def table(n: int = 200, d: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, d))


# --- toy sets -------------------------------------------------------------------------------------------------------------


def curve_density(x: np.ndarray, curve: np.ndarray, std: float) -> np.ndarray:
    square = (x**2).sum(1)[:, None] + (curve**2).sum(1)[None] - 2 * x @ curve.T
    return logsumexp(-square / (2 * std**2), axis=1) - math.log(len(curve) * 2 * math.pi * std**2)


def rings_density(x: np.ndarray, radii: list[float], std: float) -> np.ndarray:
    r = np.hypot(*x.T)[:, None]
    radius = np.array(radii)[None]
    ring = np.exp(-((r - radius) ** 2) / (2 * std**2)) * i0e(r * radius / std**2) / (2 * math.pi * std**2)
    return np.log(np.maximum(ring.mean(1), 1e-300))


def hash_density(x: np.ndarray) -> np.ndarray:
    centres = np.array([[0, 0], [1.25, 1.25], [1.25, -1.25], [-1.25, 1.25], [-1.25, -1.25]])
    p = 5 * np.exp(curve_density(x, centres, math.sqrt(0.02)))
    for along, across in ((0, 1), (1, 0)):
        a, b = np.abs(x[:, along]), np.abs(x[:, across])
        p = p + np.where((a < 1.25) & (b > 0.4) & (b < 0.5), 4.0, 0.0)
    return np.log(p / 9)


def letters_density(x: np.ndarray) -> np.ndarray:
    p = 3 * np.exp(curve_density(x, np.array([[0, 0], [1.2, 0.5], [-1.0, 1.3]]), 0.12))
    for x0, y0, width, height in ((-1.5, -0.8, 0.2, 1.6), (-0.7, -0.8, 0.2, 1.6), (-1.3, -0.1, 0.6, 0.2),
                                  (0.5, -0.8, 0.2, 1.6), (0.7, -0.8, 0.8, 0.2)):  # fmt: skip
        inside = (x > [x0, y0]) & (x < [x0 + width, y0 + height])
        p = p + inside.all(1) / (width * height)
    return np.log(p / 8)


def spirals_density(x: np.ndarray) -> np.ndarray:
    turn = 3 * math.pi * np.sqrt((np.arange(1200) + 0.5) / 1200)
    arm = np.stack([-np.cos(turn) * turn, np.sin(turn) * turn], 1) / 3

    def one(y: np.ndarray) -> np.ndarray:
        d = y[:, None] - arm[None]
        boxes = (ndtr(d / 0.1) - ndtr((d - 1 / 6) / 0.1)) * 6
        return boxes.prod(-1).mean(1)

    return np.log(0.5 * (one(x) + one(-x)))


def log_density(name: str, x: np.ndarray) -> np.ndarray:
    """An independent evaluation of each set's density."""
    if name == "checkerboard":
        return np.full(len(x), -math.log(32))
    if name in ("line", "cos"):
        mean = x[:, 0] if name == "line" else 2.5 * np.sin(x[:, 0])
        return -math.log(5) - 0.5 * ((x[:, 1] - mean) / 0.1) ** 2 - math.log(0.1 * math.sqrt(2 * math.pi))
    if name == "8gaussians":
        a = np.arange(8) * math.pi / 4
        return curve_density(x, 4 / 1.414 * np.stack([np.cos(a), np.sin(a)], 1), 0.5 / 1.414)
    if name == "rings":
        return rings_density(x, [0.75, 1.5, 2.25, 3.0], 0.08)
    if name == "circles":
        return rings_density(x, [1.5, 3.0], 0.24)
    if name == "moons":
        a = np.pi * (np.arange(400) + 0.5) / 400
        upper, lower = np.stack([np.cos(a), np.sin(a)], 1), np.stack([1 - np.cos(a), 0.5 - np.sin(a)], 1)
        return curve_density(x, 2 * np.concatenate([upper, lower]) + [-1.0, -0.2], 0.2)
    if name == "swissroll":
        t = 1.5 * math.pi * (1 + 2 * (np.arange(1500) + 0.5) / 1500)
        return curve_density(x, np.stack([t * np.cos(t), t * np.sin(t)], 1) / 5, 0.2)
    if name == "letters-gaussian":
        return letters_density(x)
    return spirals_density(x) if name == "2spirals" else hash_density(x)


@pytest.mark.parametrize("name", toy.ENTROPY)
def test_toy_entropy_is_that_of_the_samples_under_the_independent_density(name: str) -> None:
    x = toy.sample(name, 3000, seed=1).astype(np.float64)
    nats = -log_density(name, x)
    assert np.isfinite(nats).all()
    error = nats.std() / math.sqrt(len(nats))
    assert abs(nats.mean() - toy.ENTROPY[name]) < 4 * error + 2e-4


@pytest.mark.parametrize("name", ["8gaussians", "rings", "hash-gaussian"])
def test_toy_entropy_constant_by_quadrature(name: str) -> None:
    centre = 5 * (np.arange(400) + 0.5) / 400 if name != "hash-gaussian" else 2.5 * (np.arange(500) + 0.5) / 500
    cell = (centre[1] - centre[0]) ** 2
    x = np.stack(np.meshgrid(centre, centre), -1).reshape(-1, 2)  # all three are symmetric in both axes
    log_p = log_density(name, x)
    p = np.exp(log_p)
    assert 4 * p.sum() * cell == pytest.approx(1, abs=1e-3)
    assert -4 * (p * np.where(p > 0, log_p, 0)).sum() * cell == pytest.approx(toy.ENTROPY[name], abs=3e-3)


@pytest.mark.parametrize("name", toy.TOYS)
def test_toy_sample_count_type_and_seed(name: str) -> None:
    for n in (0, 1, 7):
        x = toy.sample(name, n, 0)
        assert x.shape == (n, 2) and x.dtype == np.float32
    x = toy.sample(name, 500, 3)
    assert np.array_equal(x, toy.sample(name, 500, np.random.default_rng(3)))
    assert not np.array_equal(x, toy.sample(name, 500, 4))
    assert np.abs(x).max() < 6


def test_checkerboard_cells() -> None:
    x = toy.sample("checkerboard", 16000, 0)
    cell = np.floor(x / 2).astype(int)
    assert ((cell.sum(1) % 2) == 0).all() and np.abs(x).max() <= 4
    counts = np.unique(cell, axis=0, return_counts=True)[1]
    assert len(counts) == 8 and np.abs(counts - 2000).max() < 5 * math.sqrt(2000)


def test_eight_gaussians_means_and_spread() -> None:
    x = toy.sample("8gaussians", 16000, 0)
    which = np.rint(np.arctan2(x[:, 1], x[:, 0]) / (math.pi / 4)).astype(int) % 8
    for k in range(8):
        part = x[which == k]
        centre = 4 / 1.414 * np.array([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)])
        assert np.abs(part.mean(0) - centre).max() < 0.05
        assert part.std(0) == pytest.approx(0.5 / 1.414, abs=0.03)


def test_pinwheel_arms() -> None:
    x = toy.sample("pinwheel", 20000, 0).astype(np.float64) / 2
    # |x|^2 = a^2 + b^2 with a ~ N(1, 0.09), b ~ N(0, 0.01)
    assert (x**2).sum(1).mean() == pytest.approx(1.1, abs=0.02)
    phase = np.exp(5j * np.arctan2(x[:, 1], x[:, 0]))  # the arms fall together under five-fold rotation
    near, far = (phase[np.abs(np.hypot(*x.T) - r) < 0.05].mean() for r in (0.9, 1.1))
    assert np.angle(far / near) == pytest.approx(-5 * 0.25 * (math.exp(1.1) - math.exp(0.9)), abs=0.15)


def test_toy_splits() -> None:
    data = datasets.load("moons", sizes=(300, 40, 50), limit=100, seed=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 40, 50)
    assert data.kind == "toy" and data.event_shape == (2,) and data.levels is None and data.entropy == toy.ENTROPY["moons"]
    assert any("limit" in n for n in data.notices)
    again = datasets.load("moons", sizes=(300, 40, 50), limit=100, seed=2)
    assert torch.equal(data.train, again.train) and not torch.equal(data.validation[:40], data.test[:40])


def picture(path: Path, **kwargs: Any) -> np.ndarray:
    grey = np.full((40, 80), 235, np.uint8)
    grey[5:15, 10:30], grey[25:35, 50:60] = 0, 130
    Image.fromarray(grey).save(path, **kwargs)
    return grey


def test_picture_density(tmp_path: Path) -> None:
    grey = picture(tmp_path / "p.png")
    density = PictureDensity(tmp_path / "p.png")
    x = density.sample(40000, np.random.default_rng(0))
    column, row = np.floor(x[:, 0] * 10 + 40).astype(int), np.floor(20 - x[:, 1] * 10).astype(int)
    counts = np.zeros_like(grey, dtype=float)
    np.add.at(counts, (row, column), 1)
    assert (counts[grey == 235] == 0).all()
    assert np.corrcoef(counts.ravel(), 235.0 - grey.ravel())[0, 1] > 0.97
    p = (235.0 - grey) / (235.0 - grey).sum()
    assert density.entropy == pytest.approx(-(p[p > 0] * np.log(p[p > 0] / 0.01)).sum())
    light = datasets.load(f"picture:{tmp_path / 'p.png'}", invert=True, sizes=(500, 10, 10))
    assert light.kind == "toy" and light.train.abs().max() <= 4 and light.entropy is not None
    assert not ((light.train[:, 0] < -1.01) & (light.train[:, 0] > -2.99) & (light.train[:, 1] > 0.51)
                & (light.train[:, 1] < 1.49)).any()  # fmt: skip


def test_transparent_is_empty(tmp_path: Path) -> None:
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:10, :10, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    x = PictureDensity(tmp_path / "a.png").sample(200, np.random.default_rng(0))
    assert (x[:, 0] <= 0).all() and (x[:, 1] >= 0).all()


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8000, 10000, 60000])
def test_decompression_bomb(tmp_path: Path, side: int) -> None:
    (tmp_path / "b.png").write_bytes(png_of_size(side, side))
    with pytest.raises(DataError, match="decompression bomb"):
        datasets.load(tmp_path / "b.png")


# --- named images ---------------------------------------------------------------------------------------------------------


# --- tables ---------------------------------------------------------------------------------------------------------------


def test_protein() -> None:
    path = shared("tabular/protein.npy")
    data = datasets.load(path)
    assert any("1,712 exact duplicate rows dropped" in n for n in data.notices)
    found = [n for n in data.notices if "lattice" in n]
    assert len(found) == 1 and found[0].startswith("column 7 has 341 distinct values") and "step 0.9999" in found[0]
    assert len(data.train) + len(data.validation) + len(data.test) == 45730 - 1712
    raw, rows = np.load(path), torch.cat([data.train, data.validation, data.test]).numpy()
    other = [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert np.array_equal(np.unique(rows[:, other], axis=0), np.unique(np.delete(np.unique(raw, axis=0), 7, 1), axis=0))
    assert len(np.unique(rows[:, 7])) > 40000
    kept = datasets.load(path, discrete="keep")
    assert torch.equal(kept.test[:, other], data.test[:, other])
    noise = (data.test - kept.test)[:, 7]
    assert 0 <= noise.min() < 0.01 and 0.99 < noise.max() <= 1.0001
    with pytest.raises(DataError, match="column 7"):
        datasets.load(path, discrete="error")


def test_power_and_miniboone_lattices() -> None:
    data = datasets.load(shared("tabular/power_first37283.npy"))
    assert [sum(f"column {j} has" in n for n in data.notices) for j in range(8)] == [1] * 8
    mini = datasets.load(shared("tabular/miniboone_first1523.npy"))
    assert not any("lattice" in n for n in mini.notices)


RNG = np.random.default_rng(1)
COLUMNS = [
    ("thousandths in float32", np.round(RNG.normal(size=20000) * 0.2, 3).astype(np.float32), 0.001),
    ("integers in a small table", np.rint(RNG.normal(size=200) * 8), 1.0),
    ("tenths, 150 rows", np.round(RNG.normal(size=150) * 0.8 + 5, 1), 0.1),
    ("with an offset", 0.025 + np.rint(RNG.normal(size=5000) * 30), 1.0),
    ("binary", (RNG.random(300) < 0.3).astype(float), 1.0),
    ("step below the smallest gap", np.repeat([0.0, 2.0, 5.0], 50), 1.0),
    ("sparse with outliers", np.concatenate([np.rint(RNG.normal(size=5000) * 5), [4000.0, -91234.0]]), 1.0),
    ("decimals by arithmetic", np.add.accumulate(np.full(40, 0.1))[RNG.integers(40, size=900)], 0.1),
    ("continuous", RNG.normal(size=5000), None),
    ("continuous in float32", RNG.random(50000).astype(np.float32), None),
    ("float16", RNG.random(200).astype(np.float16), None),
    ("five digits", np.array([float(f"{v:.5g}") for v in RNG.normal(size=20000) * 100]), None),
    ("small and continuous", RNG.random(12), None),
    ("few values off a lattice", np.repeat([0.1234, 1.777, 3.14159, 4.0], 100), None),
]


@pytest.mark.parametrize(("column", "step"), [c[1:] for c in COLUMNS], ids=[c[0] for c in COLUMNS])
def test_lattice_rule(column: np.ndarray, step: float | None) -> None:
    found = lattice_step(column.astype(np.float64), float(np.finfo(column.dtype).eps))
    assert found is None if step is None else found == pytest.approx(step, rel=1e-4)
    if step == 1.0:
        assert found == 1.0  # not what least squares happen to give on this processor


def test_false_alarms_are_rare() -> None:
    rng = np.random.default_rng(2)
    for n in (10, 30, 100, 1000):
        for _ in range(50):
            assert lattice_step(rng.normal(size=n).astype(np.float32).astype(np.float64), F32) is None


def test_discrete_off_a_lattice_and_atoms_are_reported(tmp_path: Path) -> None:
    x = table(400)
    x[:, 1] = np.repeat([0.1234, 1.777, 3.14159, 4.0], 100)
    x[:40, 2] = 0.5
    np.save(tmp_path / "t.npy", x)
    notices = datasets.load(tmp_path / "t.npy").notices
    assert any("column 1" in n and "on no lattice" in n for n in notices)
    assert any("column 2 is 0.5 in 10%" in n for n in notices)


def test_duplicates_go_before_noise_and_do_not_leak(tmp_path: Path) -> None:
    x = np.round(table(300, 3), 1)
    x = np.concatenate([x, x[:25], [[0.0, 1.0, 2.0]], [[-0.0, 1.0, 2.0]]])
    expected = len(x) - len({tuple(row + 0.0) for row in x})
    np.save(tmp_path / "t.npy", x)
    data = datasets.load(tmp_path / "t.npy")
    assert any(f"{expected} exact duplicate rows dropped" in n for n in data.notices)
    kept = datasets.load(tmp_path / "t.npy", duplicates="keep", discrete="keep")
    assert len(kept.train) + len(kept.validation) + len(kept.test) == len(x)


def test_splits_depend_on_split_seed_only(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", table())
    a, b, c = (datasets.load(tmp_path / "t.npy", seed=s, split_seed=p) for s, p in ((0, 0), (1, 0), (0, 1)))
    assert torch.equal(a.test, b.test) and torch.equal(a.train, b.train) and not torch.equal(a.test, c.test)
    assert (len(a.train), len(a.validation), len(a.test)) == (160, 20, 20)
    rows = np.concatenate([a.train, a.validation, a.test])
    assert np.array_equal(np.unique(rows, axis=0), np.unique(table().astype(np.float32), axis=0))
    few = datasets.load(tmp_path / "t.npy", limit=30, validation_fraction=0.2)
    assert len(few.train) == 30 and len(few.validation) == 40 and torch.equal(few.test, a.test)


# --- the user's files -----------------------------------------------------------------------------------------------------


def images(n: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, 6, 5), dtype=np.uint8)


def test_npz_with_its_own_split(tmp_path: Path) -> None:
    x = table(60)
    np.savez(tmp_path / "x.npz", x_train=x[:30], x_validation=x[30:40], x_test=np.concatenate([x[40:], x[:1]]))
    data = datasets.load(tmp_path / "x.npz")
    assert np.array_equal(data.train, x[:30].astype(np.float32)) and len(data.test) == 21
    assert any("1 exact duplicate rows kept" in n for n in data.notices)


def test_split_of_a_table_without_validation(tmp_path: Path) -> None:
    x = table(60)
    np.savez(tmp_path / "x.npz", x_train=x[:40], x_test=np.concatenate([x[40:], x[:2]]), y_train=x[:40, 0], y_test=x[38:, 0])
    data = datasets.load(tmp_path / "x.npz", validation_fraction=0.25, split_seed=3)
    assert np.array_equal(data.test, np.concatenate([x[40:], x[:2]]).astype(np.float32))
    assert (len(data.train), len(data.validation)) == (30, 10)
    assert np.array_equal(np.unique(np.concatenate([data.train, data.validation]), axis=0), np.unique(x[:40].astype(np.float32), axis=0))
    # a quantity to be predicted is no label
    assert data.classes == () and any("y_test, y_train" in n for n in data.notices)
    assert any("2 exact duplicate rows kept" in n and "2 of them in the test part" in n for n in data.notices)
    for i, part in enumerate((x[:40], x[40:])):
        np.save(tmp_path / f"{('train', 'test')[i]}_part.npy", part)
    (tmp_path / "x.npz").unlink()
    pair = datasets.load(tmp_path, validation_fraction=0.25, split_seed=3)
    assert torch.equal(pair.train, data.train) and len(pair.test) == 20


def test_lattice_of_a_given_split_is_one(tmp_path: Path) -> None:
    x = table(600)
    x[:, 1] = np.rint(3 * x[:, 1])
    np.savez(tmp_path / "x.npz", x_train=x[:400], x_validation=x[400:500], x_test=x[500:])
    data = datasets.load(tmp_path / "x.npz")
    for part, raw in ((data.train, x[:400]), (data.validation, x[400:500]), (data.test, x[500:])):
        noise = part[:, 1].double().numpy() - raw[:, 1]
        assert noise.min() >= -1e-6 and 0.9 < noise.max() <= 1 + 1e-6
        assert np.array_equal(part[:, 0], raw[:, 0].astype(np.float32))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv(tmp_path: Path, delimiter: str, header: bool, bom: str) -> None:
    x = table(30, 2)
    lines = [delimiter.join(["height", '"the weight"'])] * header + [delimiter.join(map(repr, map(float, r))) for r in x]
    (tmp_path / "x.csv").write_text(bom + "\n".join(lines) + "\n\n", encoding="utf-8")
    data = datasets.load(tmp_path / "x.csv")
    assert data.columns == (("height", "the weight") if header else ("column 0", "column 1"))
    assert same_rows(data, x.astype(np.float32))


def test_labels_that_nobody_asked_for_are_left_aside(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=table(1500), labels=np.arange(1500))
    data = datasets.load(tmp_path / "x.npz")
    assert data.classes == () and any(n.startswith("labels not used") and "at most 1000 classes, got 1500" in n for n in data.notices)


def test_csv_with_columns_of_one_name(tmp_path: Path) -> None:
    x = table(30, 3)
    lines = ["a,b,a", *(",".join(map(repr, map(float, r))) for r in x)]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    assert datasets.load(tmp_path / "x.csv").columns == ("a (0)", "b", "a (2)")


# --- bad input ------------------------------------------------------------------------------------------------------------


class Evil:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Evil, "ran", True)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl", ".pt"])
def test_pickles_are_never_run(tmp_path: Path, suffix: str) -> None:
    path, array = tmp_path / f"evil{suffix}", np.array([Evil()], dtype=object)
    if suffix == ".npy":
        np.save(path, array, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, x=array)
    else:
        path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="can run code"):
        datasets.load(path)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"refused|cannot be read"):
        datasets.load(tmp_path / "raw.npy")
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.pickle").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="to_csv"):
        datasets.load("gas", root=tmp_path)
    assert not Evil.ran


def spoiled(**changes: Any) -> np.ndarray:
    x = table()
    for where, value in changes.items():
        x[5 if where == "cell" else slice(None), 1] = value
    return x


BAD_ARRAYS = [
    (spoiled(cell=np.nan), "1 values that are NaN or missing, the first in row 5, column 1"),
    (spoiled(cell=np.inf), "NaN or infinite"),
    (spoiled(column=2.5), "column 1 .*is constant"),
    (spoiled(column=1.7e9 + 3 * np.arange(200)), "float32 cannot resolve"),
    (table(9), "9 rows .*at least 10"),
    (table(200)[:, 0], r"shape \(200,\)"),
    (np.zeros((0, 3)), "no rows"),
    (np.zeros((20, 0)), "at least one column"),
    (table().astype(complex), "real numbers"),
    (np.array([["a", "b"]] * 20), "real numbers"),
    (table().reshape(50, 4, 3), "must be uint8"),
    (np.array([[1.0], [np.nan]] * 20, dtype=np.float32), "20 values that are NaN"),
    (table().reshape(10, 5, 4, 3, 1), "must be a table"),
]


@pytest.mark.parametrize(("array", "message"), BAD_ARRAYS, ids=[m[:24] for _, m in BAD_ARRAYS])
def test_bad_arrays(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=message):
        datasets.load(tmp_path / "x.npy")


BAD_NPZ: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"y": table()}, {}, "expected exactly one of"),
    ({"x": table(), "images": images()}, {}, "expected exactly one of"),
    ({"x": table(), "labels": np.zeros(3)}, {}, r"must have shape \(200,\), one for each row, got \(3,\)"),
    ({"x": table(), "labels": table(200, 1)[:, 0]}, {"condition": "label"}, "integers or strings"),
    ({"x": table(1500), "labels": np.arange(1500)}, {"condition": "label"}, "at most 1000 classes"),
    ({"x": np.float64(3), "labels": np.zeros(1)}, {}, r"must have shape \(\), one for each row, got \(1,\)"),
    ({"x": np.float64(3)}, {}, r"shape \(\)"),
    ({"x": table()}, {"condition": "label"}, "needs labels"),
    ({"x_train": table(), "x_validation": table()}, {}, "lacks test"),
    ({"x_test": table(), "x_val": table()}, {}, "lacks train"),
    ({"x_train": table(), "x_test": table(), "labels_test": np.zeros(200)}, {}, "labels for test but not for train"),
    ({"x_train": table(2), "x_test": table(30)}, {}, "too few to hold some out"),
    ({"x_train": table(), "x_test": table(), "x_validation": table(20, 2)}, {}, "differ in row shape"),
    ({"x_train": table(), "x_test": table()[:0], "x_validation": table(20)}, {}, "test part .*is empty"),
]


@pytest.mark.parametrize(("arrays", "options", "message"), BAD_NPZ, ids=[m[:24] for *_, m in BAD_NPZ])
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        datasets.load(tmp_path / "x.npz", **options)


BAD_CSV = [
    ("a,b\n1,2\n3,x\n", "row 3, column 'b'.*'x'"),
    ("1,2\n3,\n", "first in line 2, column 1; missing by column: 'column 1' 1"),
    ("1;2.5\n3;4,5\n", "row 2, column 'column 1'.*'4,5'.*decimals with a point"),
    ("1,b\n3,4\n", "row 1.*header"),
    ("a,b\n1,2\n3\n", "row 3 .*has 1 cells; expected 2"),
    ("a,b\n", "no rows of numbers"),
    ("", "no rows of numbers"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CSV)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        datasets.load(tmp_path / "x.csv")
    (tmp_path / "binary.csv").write_bytes(b"h\x81\x00\x02he\n1\n")
    with pytest.raises(DataError, match="cannot be read"):
        datasets.load(tmp_path / "binary.csv")


def test_bad_files_and_folders(tmp_path: Path) -> None:
    for name in ("broken.npy", "broken.npz", "broken.png"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nonsense")
        with pytest.raises(DataError, match="cannot be read"):
            datasets.load(tmp_path / name)
    (tmp_path / "x.dat").write_text("1")
    with pytest.raises(DataError, match="no known kind"):
        datasets.load(tmp_path / "x.dat")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000, 5), }"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
    with pytest.raises(DataError, match="cannot be read"):
        datasets.load(tmp_path / "huge.npy")
    deep = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(deep, "PNG")
    (tmp_path / "deep.png").write_bytes(deep.getvalue())
    with pytest.raises(DataError, match="more than 8 bits"):
        datasets.load(tmp_path / "deep.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    with pytest.raises(DataError, match="one grey value"):
        datasets.load(tmp_path / "white.png")
    with pytest.raises(DataError, match="does not exist"):
        datasets.load(tmp_path / "nowhere.npy")
    with pytest.raises(DataError, match="does not exist"):
        datasets.load(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("8gausians", {}, DataError, "did you mean '8gaussians'"),
        ("zzzzz", {}, DataError, "known names: digits"),
        ("digits", {"condition": "colour"}, ConfigError, "condition must be None, 'label' or 'target' for 'digits', got 'colour'"),
        ("moons", {"condition": "label"}, DataError, "needs labels"),
        ("moons", {"nbits": 5}, ConfigError, "nbits=5 does not apply to 'moons'"),
        ("digits", {"nbits": 5}, ConfigError, "17 levels"),
        ("digits", {"nbits": 9}, ConfigError, "nbits must be between 1 and 8, got 9"),
        ("digits", {"image_size": 4}, ConfigError, "folder of images"),
        ("digits", {"invert": True}, ConfigError, "density of an image"),
        ("digits", {"limit": 0}, ConfigError, "at least 1"),
        ("digits", {"seed": -1}, ConfigError, "seed must be at least 0, got -1"),
        ("digits", {"discrete": "maybe"}, ConfigError, "dequantize"),
        ("digits", {"duplicates": "maybe"}, ConfigError, "'drop'"),
        ("digits", {"test_fraction": 1.0}, ConfigError, "sum below 1"),
        ("moons", {"sizes": (5, 5)}, ConfigError, "three positive numbers"),
        ("power", {"discrete": "keep"}, ConfigError, "published protocol"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        datasets.load(name, **options)


# --- the published tabular sets -------------------------------------------------------------------------------------------


def standardised(data: datasets.DataSplits) -> bool:
    return bool(torch.allclose(data.train.mean(0), torch.zeros(1), atol=1e-4) and torch.allclose(data.train.std(0), torch.ones(1), atol=0.01))


def test_power(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "power").mkdir()
    raw = np.column_stack([np.round(rng.random((1000, 4)), 3), rng.integers(9, size=(1000, 3)), np.arange(1000)])
    np.save(tmp_path / "power" / "data.npy", raw)
    data = datasets.load("power", root=tmp_path)
    assert data.event_shape == (6,) and standardised(data)
    assert (len(data.train), len(data.validation), len(data.test)) == (810, 90, 100)
    order = np.arange(1000.0)
    np.random.RandomState(42).shuffle(order)  # the minute, without noise, shows the published shuffle
    assert np.allclose(data.test[:, 5], (order[900:] - order[:810].mean()) / order[:810].std(), atol=1e-5)
    np.save(tmp_path / "power" / "data.npy", raw[:, :7])
    with pytest.raises(DataError, match="must have 8 columns"):
        datasets.load("power", root=tmp_path)


def test_gas(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "gas").mkdir()
    base = rng.normal(size=(500, 8))
    sensors = np.concatenate([base + 0.01 * rng.normal(size=base.shape), base], axis=1)
    np.save(tmp_path / "gas" / "ethylene_CO.npy", np.column_stack([np.arange(500), base[:, :2], sensors]))
    data = datasets.load("gas", root=tmp_path)
    assert data.event_shape == (8,) and standardised(data)
    mean, std = base[:405].mean(0), base[:405].std(0)  # the first of each pair is dropped, rows keep their order
    assert np.allclose(data.test, (base[450:] - mean) / std, atol=1e-4)
    (tmp_path / "gas" / "ethylene_CO.npy").unlink()
    header = ",".join(["Time", "Meth", "Eth", *(f"R{i}" for i in range(16))])
    full = np.column_stack([np.arange(500), base[:, :2], sensors])
    np.savetxt(tmp_path / "gas" / "ethylene_CO.csv", full, delimiter=",", header=header, comments="")
    assert torch.allclose(datasets.load("gas", root=tmp_path).test, data.test, atol=1e-5)


def test_hepmass(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "hepmass").mkdir()
    for part, extra in (("train", 0), ("test", 1)):
        x = rng.normal(size=(300, 27))
        x[:, 4:10] = rng.integers(2, size=(300, 6))
        x = np.column_stack([np.arange(300) % 2, x, *[np.full(300, 1000.0)] * extra])
        header = ",".join(["# label", *(f"f{i}" for i in range(27 + extra))])
        np.savetxt(tmp_path / "hepmass" / f"1000_{part}.csv", x, delimiter=",", header=header, comments="")
    data = datasets.load("hepmass", root=tmp_path)
    assert data.event_shape == (21,) and standardised(data)
    assert (len(data.train), len(data.validation), len(data.test)) == (135, 15, 150)
    (tmp_path / "hepmass" / "1000_test.csv").write_text("label\n1,x\n")
    with pytest.raises(DataError, match="cannot be read"):
        datasets.load("hepmass", root=tmp_path)


@pytest.mark.parametrize("name", ["power", "gas", "hepmass", "miniboone", "bsds300"])
def test_missing_tabular_names_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)(?i){name}.*data/README.md"):
        datasets.load(name, root=tmp_path)


def test_miniboone_and_bsds300(tmp_path: Path) -> None:
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", 3 + 5 * table(500, 43))
    data = datasets.load("miniboone", root=tmp_path, limit=100)
    assert data.event_shape == (43,) and len(data.test) == 50 and len(data.train) == 100
    (tmp_path / "BSDS300").mkdir()
    path = tmp_path / "BSDS300" / "BSDS300.hdf5"
    try:
        import h5py
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(DataError, match="pip install h5py"):
            datasets.load("bsds300", root=tmp_path)
        return
    with h5py.File(path, "w") as file:
        for part, n in (("train", 50), ("validation", 20), ("test", 10)):
            file[part] = table(n, 63)
    bsds = datasets.load("bsds300", root=tmp_path)
    assert bsds.event_shape == (63,) and np.allclose(bsds.test, table(10, 63), atol=1e-6)


def test_names() -> None:
    known = datasets.names()
    images = {"digits", "mnist", "fashion-mnist", "cifar10", "svhn", "celeba", "imagenet32", "imagenet64", "celebahq256", "tiny-imagenet"}
    assert set(toy.TOYS) < set(known) and images < set(known) and {"power", "bsds300"} < set(known)
    assert all(line and "\n" not in line for line in known.values())


def test_an_array_of_the_other_byte_order(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 2))
    found = []
    for name, kind in (("plain", "<f8"), ("other", ">f8")):
        np.save(tmp_path / f"{name}.npy", x.astype(kind))
        found.append(datasets.load(str(tmp_path / f"{name}.npy")).train)
    assert torch.equal(*found)
