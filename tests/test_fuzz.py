"""Damaged and invented files: only documented exceptions, never a hang, and no wrong number where a checksum can tell."""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_datasets_images import colour, python2_batch

from cnf import data as datasets
from cnf.compat import load_reference, read_reference
from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data.arrays import read_numpy
from cnf.data.cifar import parse_batch
from cnf.data.items import read_items
from cnf.data.pictures import SUFFIXES, open_picture
from cnf.data.text import read_csv
from cnf.errors import CheckpointError, CNFError, DataError
from cnf.runs import (
    RunInfo,
    config_digest,
    load,
    load_trainer,
    read_config,
    save_trainer,
    write_config,
    write_weights,
)

SECONDS = 5.0  # a reader that takes longer hangs; the files take milliseconds
FEW, MANY = 30, 1500  # damaged files of each kind
INFO = RunInfo(RunConfig("own", DataConfig("x.npy"), FlowConfig.of(hidden=(5,)), SolverConfig(), TrainConfig()), (2,), None, 0, (), ("x", "y"))
SETTINGS = {
    "derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck),
}  # fmt: skip


class Hang(BaseException):
    """No reader's ``except Exception`` catches it."""


@contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: its name in the folder.
        read: what is read from the folder, as something that can be compared by ``repr``.
        allowed: the documented exception.
        exact: whether a checksum tells that what is read is what was written.
    """

    file: str
    read: Callable[[Path], Any]
    allowed: type[CNFError]
    exact: bool


def arrays(found: dict[str, Any]) -> Any:
    return sorted((k, v.dtype.str, v.shape, v.tobytes()) for k, v in found.items())


def tensors(found: dict[str, Any]) -> Any:
    return arrays({k: v.numpy() for k, v in found.items()})


def splits(path: Path) -> Any:
    picture = path.suffix in SUFFIXES
    found = datasets.load(path, **({"sizes": (9, 5, 5)} if picture else {}))
    return [p.numpy().tobytes() for p in (found.train, found.validation, found.test)]


def trainer_state(folder: Path) -> Any:
    state = load_trainer(folder)[0]
    return {**state, "w": state["w"].numpy().tobytes()}


def reference(file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = read_reference(folder / file)
        return tensors(found.state), found.args.values

    return read


KINDS = {
    "config": Kind("config.json", read_config, CheckpointError, True),
    "weights": Kind("model.safetensors", lambda f: tensors(load(f).state_dict()), CheckpointError, True),
    "trainer": Kind("trainer.pt", trainer_state, CheckpointError, True),
    "reference": Kind("new.pth", reference("new.pth"), CheckpointError, True),
    "old reference": Kind("old.pth", reference("old.pth"), CheckpointError, False),
    "reference flow": Kind("old.pth", lambda f: load_reference(f / "old.pth", event_shape=(2,)).state_dict().keys(), CheckpointError, False),
    "npy": Kind("x.npy", lambda f: splits(f / "x.npy"), DataError, False),
    "npz": Kind("x.npz", lambda f: arrays(read_numpy(f / "x.npz")), DataError, True),
    "deflated npz": Kind("deflated.npz", lambda f: splits(f / "deflated.npz"), DataError, True),
    "csv": Kind("x.csv", lambda f: splits(f / "x.csv"), DataError, False),
    "packed csv": Kind("x.csv.gz", lambda f: splits(f / "x.csv.gz"), DataError, False),
    "parquet": Kind("x.parquet", lambda f: splits(f / "x.parquet"), DataError, False),
    "excel": Kind("x.xlsx", lambda f: splits(f / "x.xlsx"), DataError, False),
    "csv items": Kind("x.csv", lambda f: read_items([f / "x.csv"], (2,)).x, DataError, False),
    "png": Kind("x.png", lambda f: splits(f / "x.png"), DataError, True),
    "deep png": Kind("rgba.png", lambda f: np.asarray(open_picture(f / "rgba.png")).tobytes(), DataError, True),
    "jpeg": Kind("x.jpg", lambda f: splits(f / "x.jpg"), DataError, False),
    "progressive jpeg": Kind("p.jpg", lambda f: np.asarray(open_picture(f / "p.jpg")), DataError, False),
    "webp": Kind("x.webp", lambda f: np.asarray(open_picture(f / "x.webp")), DataError, False),
    "bmp": Kind("x.bmp", lambda f: splits(f / "x.bmp"), DataError, False),
    "tiff": Kind("x.tif", lambda f: splits(f / "x.tif"), DataError, False),
    "packed tiff": Kind("p.tif", lambda f: np.asarray(open_picture(f / "p.tif")), DataError, False),
    "jpeg in tiff": Kind("j.tif", lambda f: np.asarray(open_picture(f / "j.tif")), DataError, False),
    "cifar10": Kind("batch", lambda f: batch(f / "batch"), DataError, False),
}


def batch(path: Path) -> Any:
    try:
        return parse_batch(path.read_bytes())
    except ValueError as error:
        raise DataError(str(error)) from None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    flow = INFO.build()
    write_config(folder, INFO)
    write_weights(folder, flow)
    save_trainer(folder, {"step": 7, "best": 1.25, "w": torch.arange(40.0), "numbers": {"a": [1, 2, "x"]}})
    layers = {f"chain.0.odefunc.diffeq.layers.{j}._layer": torch.nn.Linear(a, b) for j, (a, b) in enumerate([(3, 4), (5, 2)])}
    state = {f"{name}.{k}": v for name, layer in layers.items() for k, v in layer.state_dict().items()}
    state["chain.0.sqrt_end_time"] = torch.tensor(1.0)
    args = argparse.Namespace(dims="4", layer_type="concat", nonlinearity="tanh", num_blocks=1, residual=False, solver="dopri5")
    for name, new in (("new.pth", True), ("old.pth", False)):
        torch.save({"state_dict": state, "args": args}, folder / name, _use_new_zipfile_serialization=new)
    x = rng.normal(size=(60, 2))
    np.save(folder / "x.npy", x)
    np.savez(folder / "x.npz", x=x, labels=np.arange(60) % 3)
    np.savez_compressed(folder / "deflated.npz", x=np.round(x, 1))
    (folder / "x.csv").write_text("a,b\n" + "\n".join(f"{a!r},{b!r}" for a, b in x.tolist()) + "\n")
    table = pd.read_csv(folder / "x.csv")
    table.to_csv(folder / "x.csv.gz", index=False)
    table.to_parquet(folder / "x.parquet")
    table.to_excel(folder / "x.xlsx", index=False)
    grey = Image.fromarray(rng.integers(256, size=(12, 10), dtype=np.uint8))
    grey.save(folder / "x.png")
    grey.save(folder / "x.jpg", exif=Image.Exif())
    grey.save(folder / "x.bmp")
    grey.save(folder / "x.tif")
    wide = Image.fromarray(rng.integers(256, size=(12, 10, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    wide.save(folder / "rgba.png", exif=exif)
    wide.convert("RGB").save(folder / "p.jpg", progressive=True, exif=exif)
    wide.save(folder / "x.webp", exif=exif)
    wide.save(folder / "p.tif", compression="tiff_lzw", exif=exif)
    wide.convert("RGB").save(folder / "j.tif", compression="jpeg")
    (folder / "batch").write_bytes(python2_batch(colour(1, False), [3]))
    return folder


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, a piece cut off, taken out, put in, doubled or emptied; now and then several of these."""
    data = bytearray(content)
    for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 5))):
        # headers, at both ends, are hit as often as the numbers between them
        size = len(data)
        near = int(rng.integers(min(size, 300) + 1))
        at = int(rng.choice([near, size - near, int(rng.integers(size + 1))]))
        piece = slice(at, at + int(rng.choice([1, 2, 4, 8, 64])))
        how = rng.choice(["bit", "byte", "end", "out", "in", "double", "zero", "ones", "digit"], p=[0.4, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
        if how in ("bit", "byte") and at < size:
            data[at] ^= 1 << int(rng.integers(8)) if how == "bit" else int(rng.integers(1, 256))
        elif how == "end":
            del data[at:]
        elif how == "out":
            del data[piece]
        elif how == "in":
            data[at:at] = rng.bytes(piece.stop - at)
        elif how == "double":
            data[at:at] = data[piece]
        elif how in ("zero", "ones"):
            data[piece] = (b"\0" if how == "zero" else b"\xff") * len(data[piece])
        elif digits := [i for i in range(at, min(size, at + 200)) if 48 <= data[i] < 58]:
            data[digits[0] : digits[0]] = b"9" * int(rng.integers(1, 12))
        if not data:
            break
    return bytes(data)


def attack(whole: Path, folder: Path, name: str, count: int, seed: int) -> None:
    kind = KINDS[name]
    truth, content = repr(kind.read(whole)), (whole / kind.file).read_bytes()
    for other in ("config.json", "model.safetensors"):
        (folder / other).write_bytes((whole / other).read_bytes())
    refused = 0
    for i in range(count):
        bad = damage(content, np.random.default_rng([seed, i]))
        (folder / kind.file).write_bytes(bad)
        try:
            with no_hang():
                found = kind.read(folder)
        except kind.allowed as error:
            refused += 1
            assert str(error), f"{name} {i}: an error that says nothing"
        except (Exception, Hang) as error:
            raise AssertionError(f"{name}, damaged file {i} of seed {seed}: {type(error).__name__}: {error}") from error
        else:
            assert not kind.exact or repr(found) == truth, f"{name}, damaged file {i} of seed {seed}: a wrong number, unsaid"
    assert refused > count // 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(whole: Path, tmp_path: Path, name: str) -> None:
    attack(whole, tmp_path, name, FEW, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(whole: Path, tmp_path: Path, name: str) -> None:
    attack(whole, tmp_path, name, MANY, seed=1)


@pytest.mark.parametrize("name", ["config", "weights", "trainer"])
def test_every_byte_of_a_checkpoint_counts(whole: Path, tmp_path: Path, name: str) -> None:
    """One bit flipped in every byte in turn (every 7th, but for the short ones): refused, or read as what was written."""
    kind = KINDS[name]
    truth, content = repr(kind.read(whole)), (whole / kind.file).read_bytes()
    for other in ("config.json", "model.safetensors"):
        (tmp_path / other).write_bytes((whole / other).read_bytes())
    for at in range(0, len(content), 7):
        bad = bytearray(content)
        bad[at] ^= 1 << (at % 8)
        (tmp_path / kind.file).write_bytes(bad)
        try:
            found = kind.read(tmp_path)
        except CheckpointError:
            continue
        assert name != "trainer" and repr(found) == truth, f"byte {at}"


# --- invented files -------------------------------------------------------------------------------------------------------

ODD = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 0.5, math.nan, math.inf, -math.inf, True, False, None, "", "mlp", "\ud800", "1", [], {}])
JSON = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
EXAMPLES = 80


def places(raw: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in raw if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ():
        yield (*at, key)
        yield from places(raw[key], (*at, key))


def config_of() -> dict[str, Any]:
    import dataclasses

    raw = json.loads(json.dumps({"format": 2, **dataclasses.asdict(INFO)}))
    return dict(raw)


def altered(folder: Path, value: Any, place: tuple[Any, ...], sealed: bool) -> None:
    raw = config_of()
    inner = raw
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    try:
        raw["sha256"] = config_digest(raw) if sealed else config_digest(config_of())
    except ValueError:
        raw["sha256"] = ""
    (folder / "config.json").write_text(json.dumps(raw))


@given(value=JSON, place=st.sampled_from(list(places(config_of()))), sealed=st.booleans())
@settings(max_examples=3 * EXAMPLES, **SETTINGS)
def test_any_value_in_any_field_of_a_config(whole: Path, tmp_path: Path, value: Any, place: tuple[Any, ...], sealed: bool) -> None:
    """With a checksum that fits, what is read is what the file says; without, only what was written."""
    altered(tmp_path, value, place, sealed)
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    with no_hang():
        try:
            info = read_config(tmp_path)
        except CheckpointError as error:
            assert "config.json" in str(error)
            return
        assert sealed or info == INFO
        with suppress(CheckpointError):
            load(tmp_path)


@given(raw=JSON | st.dictionaries(st.sampled_from(list(config_of())), JSON))
@settings(max_examples=EXAMPLES, **SETTINGS)
def test_any_json_as_a_config(tmp_path: Path, raw: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with no_hang(), pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def safetensors_header() -> st.SearchStrategy[Any]:
    whole = st.sampled_from([0, 1, 2, 4, 8, -1, 2**31, 2**63, 10**20]) | st.integers(0, 64) | JSON
    entry = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F64", "BF16", "I8", "BOOL", "C64", "F4", "X"]) | JSON, "shape": st.lists(whole, max_size=3) | JSON,
         "data_offsets": st.lists(whole, min_size=2, max_size=2) | JSON}
    )  # fmt: skip
    names = st.sampled_from(["0.mean", "transform.transforms.0.mean", "a", "../a", ""])
    return st.dictionaries(names, entry | JSON, max_size=3) | st.fixed_dictionaries({"__metadata__": JSON, "a": entry})


@given(header=safetensors_header(), data=st.binary(max_size=64), off=st.sampled_from([0, 0, 0, 1, -1, 2**40]))
@settings(max_examples=2 * EXAMPLES, **SETTINGS)
def test_any_header_of_safetensors(whole: Path, tmp_path: Path, header: Any, data: bytes, off: int) -> None:
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", max(0, len(raw) + off)) + raw + data)
    with no_hang(), pytest.raises(CheckpointError, match=r"model\.safetensors does not hold this model's weights"):
        load(tmp_path)


SIZES = st.sampled_from([0, 1, 2, 3, 10, 60, 120, -1, 2**31, 2**40, 2**63, 10**20, True, None, "1", 1.5])


@given(
    descr=st.sampled_from(["<f8", ">f8", "<f4", "|u1", "|b1", "<c16", "<U3", "<U0", "|S9", "|V4", "<M8[D]", "|O", "<g", "x"])
    | st.lists(st.tuples(st.text(max_size=2), st.sampled_from(["<f8", "|O", "(2,)i4"])), max_size=2),
    shape=st.lists(SIZES, max_size=4).map(tuple) | JSON,
    order=st.booleans() | JSON,
    more=st.dictionaries(st.text(max_size=3), JSON, max_size=1),
    version=st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)]),
    data=st.sampled_from([0, 1, 60, 120, 480, 960, 961]),
)
@settings(max_examples=3 * EXAMPLES, **SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_any_header_of_an_array(tmp_path: Path, descr: Any, shape: Any, order: Any, more: dict[str, Any], version: tuple[int, int], data: int) -> None:
    said = repr({"descr": descr, "fortran_order": order, "shape": shape, **more}).encode("utf-8", "surrogatepass") + b"\n"
    length = struct.pack("<H" if version[0] == 1 else "<I", len(said))
    numbers = np.random.default_rng(0).bytes(data)
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY" + bytes(version) + length + said + numbers)
    with no_hang():
        with suppress(DataError):
            datasets.load(tmp_path / "x.npy")
        try:
            found = read_numpy(tmp_path / "x.npy")["x"]
        except DataError:
            return
    assert found.tobytes("F" if order else "C") == numbers  # all of it, and nothing else


CELL = st.sampled_from(["1", "-2.5", "1e400", "nan", "inf", "", " ", '"', '"a', "1_0", "0x10", "a", "１", "\0", "\x1c", "1,5", "9" * 400, "\ud7ff", "é"])


@given(rows=st.lists(st.lists(CELL | st.text(max_size=4), max_size=3), max_size=14), cut=st.sampled_from([",", ";", "\t", "|"]), end=st.sampled_from(["\n", "\r\n", "\r", ""]))
@settings(max_examples=2 * EXAMPLES, **SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_any_text_as_a_table(tmp_path: Path, rows: list[list[str]], cut: str, end: str) -> None:
    text = end.join(cut.join(row) for row in rows)
    (tmp_path / "x.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    with no_hang():
        try:
            datasets.load(tmp_path / "x.csv")
        except DataError:
            return


@given(
    table=st.integers(1, 4).flatmap(lambda d: st.lists(st.lists(st.floats() | st.integers(-(10**9), 10**9).map(float), min_size=d, max_size=d), min_size=1, max_size=9)),
    cut=st.sampled_from([",", ";", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
    head=st.booleans(),
)
@settings(max_examples=EXAMPLES, **SETTINGS)
def test_numbers_written_are_numbers_read(tmp_path: Path, table: list[list[float]], cut: str, end: str, head: bool) -> None:
    x = np.array(table)
    lines = [cut.join(f"n {j}" for j in range(x.shape[1]))] if head else []
    lines += [cut.join(map(repr, row)) for row in x.tolist()]
    (tmp_path / "x.csv").write_text(end.join(lines), newline="")
    assert np.array_equal(read_csv(tmp_path / "x.csv")[0], x, equal_nan=True)
    np.savez_compressed(tmp_path / "x.npz", x=x)
    assert np.array_equal(read_numpy(tmp_path / "x.npz")["x"], x, equal_nan=True)


STARTS = [b"", b"\x93NUMPY\1\0", b"PK\3\4", b"PK\5\6", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"\x80\2", b"\x80\2}(", b"{", struct.pack("<Q", 2) + b"{}", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]


@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=80))
@settings(max_examples=EXAMPLES // 2, **SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_for_every_reader(whole: Path, tmp_path: Path, start: bytes, rest: bytes) -> None:
    for kind in KINDS.values():
        (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
        (tmp_path / kind.file).write_bytes(start + rest)
        with no_hang():
            try:
                kind.read(tmp_path)
            except kind.allowed:
                continue
        assert kind.file == "x.csv"  # which has no form that random text could not have


def test_damage_is_the_same_each_time() -> None:
    found = [damage(bytes(range(100)), np.random.default_rng([3, i])) for i in range(50)]
    assert found == [damage(bytes(range(100)), np.random.default_rng([3, i])) for i in range(50)]
    assert len(set(found)) > 40 and io.BytesIO(found[0]).read() == found[0]
