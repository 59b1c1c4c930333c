"""Strangers' files: nothing in them is executed, nothing is written outside its place, and every lie is named."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Malicious
from PIL import Image
from test_datasets_images import cifar10, colour, python2_batch

from cnf import data as datasets
from cnf.compat import load_reference, read_reference
from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import cifar, pictures, text
from cnf.data.arrays import read_numpy
from cnf.data.pictures import open_picture
from cnf.errors import CheckpointError, DataError
from cnf.runs import (
    RunInfo,
    config_digest,
    load,
    load_trainer,
    read_config,
    save_trainer,
    weights_digest,
    write_config,
    write_weights,
)
from cnf.runs import trainer as trainer_file
from cnf.training import read_json
from cnf.training.loggers import RunLogger

CONFIG = RunConfig("own", DataConfig("x.npy"), FlowConfig.of(hidden=(5,)), SolverConfig(), TrainConfig())
INFO = RunInfo(CONFIG, (2,), None, 3, ("a", "b", "c"), ("x", "y"))


def is_real(content: bytes, trap: Path) -> bool:
    """Whether the trap snaps where pickles are trusted."""
    assert not trap.exists(), "something was executed"
    pickle.loads(content)
    found = trap.exists()
    trap.rmdir()
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    write_config(folder, INFO)
    write_weights(folder, INFO.build())
    save_trainer(folder, {"step": 1, "w": torch.arange(6.0)})
    return folder


# --- pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_is_executed_by_no_loader(tmp_path: Path, run: Path, protocol: int) -> None:
    trap = tmp_path / "executed"
    bad = pickle.dumps({"x": Malicious(trap)}, protocol=protocol)
    assert is_real(bad, trap)
    for name in ("x.npy", "x.npz", "x.csv", "x.tsv", "x.csv.gz", "x.parquet", "x.xlsx", "x.png", "x.jpg", "x.pkl", "x.pt"):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            datasets.load(tmp_path / name)
        (tmp_path / name).unlink()
    for name in ("trainer.pt", "model.safetensors", "config.json"):
        (run / name).write_bytes(bad)
    (run / "reference.pth").write_bytes(bad)
    for read in (load_trainer, load, read_config, lambda folder: read_reference(folder / "reference.pth")):
        with pytest.raises(CheckpointError):
            read(run)
    assert not trap.exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_in_a_torch_file_with_a_true_checksum(tmp_path: Path, run: Path, new: bool) -> None:
    trap = tmp_path / "executed"
    state = {"state_dict": {"w": torch.zeros(2)}, "args": argparse.Namespace(x=Malicious(trap))}
    torch.save(state, run / "reference.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"reference\.pth cannot be read.*mkdir"):
        load_reference(run / "reference.pth")
    save_trainer(run, state)
    (run / "trainer.previous.pt").unlink()
    with pytest.raises(CheckpointError, match=r"trainer\.pt: UnpicklingError"):
        load_trainer(run)
    torch.save(state, run / "model.safetensors", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="does not hold this model's weights"):
        load(run)
    assert not trap.exists()
    torch.load(run / "reference.pth", weights_only=False)
    assert trap.exists()  # the trap was a real one


@pytest.mark.parametrize("kind", ["npy", "npz", "structured"])
def test_objects_in_arrays(tmp_path: Path, kind: str) -> None:
    trap, path = tmp_path / "executed", tmp_path / ("x.npz" if kind == "npz" else "x.npy")
    x = np.array([Malicious(trap), 1], dtype=object)
    if kind == "npz":
        np.savez(path, x=x)
    else:
        np.save(path, np.array([(1, x[0])], dtype=[("a", "i4"), ("b", "O")]) if kind == "structured" else x, allow_pickle=True)
    with pytest.raises(DataError, match=r"holds pickled Python objects, which can run code"):
        datasets.load(path)
    assert not trap.exists()
    found = np.load(path, allow_pickle=True)
    assert (found["x"] if kind == "npz" else found) is not None and trap.exists()


@pytest.mark.parametrize("archive", [False, True])
def test_a_pickle_in_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool) -> None:
    """Even with the published checksums."""
    trap = tmp_path / "executed"
    bad = pickle.dumps({b"data": Malicious(trap), b"labels": [1]}, protocol=2)
    assert is_real(bad, trap)
    cifar10(monkeypatch, tmp_path / "root", {"data_batch_1": bad, "test_batch": bad}, archive)
    with pytest.raises(DataError, match=r"it asks for \S+, which is refused"):
        datasets.load("cifar10", root=tmp_path / "root", download=False)
    assert not trap.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.replace(b"numpy\ndtype", b"numpy\nload "),
        lambda b: b.replace(b"cnumpy.core.multiarray\n_reconstruct", b"cbuiltins\nexec"),
        lambda b: b.replace(b"u1", b"O8"),
        lambda b: b.replace((3072).to_bytes(4, "little"), (3071).to_bytes(4, "little")),
        lambda b: b.replace(b"\x89T", b"\x88T"),
        lambda b: b.replace(b"U\x06labels", b"U\x06lebals"),
        lambda b: b[:-1],
        lambda b: b[:500],
        lambda b: b"\x80\x02}.",
        lambda b: b"",
    ],
)
def test_batches_that_are_none(change: Callable[[bytes], bytes]) -> None:
    good = python2_batch(colour(3, False), [1, 2, 3])
    assert np.array_equal(cifar.parse_batch(good)[0], colour(3, False)) and cifar.parse_batch(good)[1] == [1, 2, 3]
    assert change(good) != good
    with pytest.raises(ValueError, match="no CIFAR-10 batch"):
        cifar.parse_batch(change(good))


def test_mnist_kept_as_pickles_by_old_versions(tmp_path: Path) -> None:
    trap, folder = tmp_path / "executed", tmp_path / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3), Malicious(trap)), folder / name)
    with pytest.raises(DataError, match="mnist was not found complete"):
        datasets.load("mnist", root=tmp_path, download=False)
    assert not trap.exists()


# --- archives -------------------------------------------------------------------------------------------------------------


def test_members_with_a_path_outside_are_written_nowhere(tmp_path: Path) -> None:
    inner = tmp_path / "in" / "celeba"
    inner.mkdir(parents=True)
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).normal(size=(40, 2)))
    outside = ("../evil.npy", str(tmp_path / "evil.npy"), "../../evil.npy")
    for name in outside:
        with zipfile.ZipFile(inner / "x.npz", "w") as archive:
            archive.writestr(name, buffer.getvalue())
        with pytest.raises(DataError, match="holds the keys"):
            datasets.load(inner / "x.npz")
    # a picture of that name is decoded in memory, and what is written stays in prepared/
    with zipfile.ZipFile(inner / "img_align_celeba.zip", "w") as archive:
        for i in range(3):
            picture = io.BytesIO()
            Image.new("RGB", (178, 218), (i, i, i)).save(picture, "PNG")
            archive.writestr(f"../../evil/{i}.jpg", picture.getvalue())
    (inner / "list_eval_partition.txt").write_text("0.jpg 0\n1.jpg 1\n2.jpg 2\n")
    datasets.load("celeba", root=tmp_path / "in")
    assert {p.name for p in tmp_path.rglob("*")} == {
        "in", "celeba", "x.npz", "img_align_celeba.zip", "list_eval_partition.txt", "prepared",
        *(p.name for p in (inner / "prepared").iterdir()),
    }  # fmt: skip
    (inner / "list_eval_partition.txt").write_text("../0.jpg 0\n1.jpg 1\n2.jpg 2\n")
    with pytest.raises(DataError, match="expected a file name"):
        datasets.load("celeba", root=tmp_path / "in")


@pytest.mark.parametrize("kind", ["link", "outside"])
def test_tar_members_that_are_links_or_lie_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    root = tmp_path / "root"
    batch = python2_batch(colour(2, False), [1, 2])
    cifar10(monkeypatch, root, {"data_batch_1": batch, "test_batch": batch}, archive=True)
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1" if kind == "link" else "../../data_batch_1")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(member)
    with pytest.raises(DataError, match="is not the published file"):
        datasets.load("cifar10", root=root, download=False)
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="is a link, or larger" if kind == "link" else "lacks cifar-10-batches-py/data_batch_1"):
        datasets.load("cifar10", root=root, download=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cifar-10-python.tar.gz", "root"]


@pytest.mark.parametrize(("name", "file"), [("svhn", "train_32x32.mat"), ("cifar10", "cifar-10-python.tar.gz"), ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz")])
def test_nothing_is_downloaded_through_a_link(tmp_path: Path, name: str, file: str) -> None:
    path, target = tmp_path / "root" / file, tmp_path / "precious"
    path.parent.mkdir(parents=True)
    target.write_text("mine")
    path.symlink_to(target)
    with pytest.raises(DataError, match="is a link"):
        datasets.load(name, root=tmp_path / "root")
    assert target.read_text() == "mine"


def zip_with(path: Path, method: int, *members: tuple[str, bytes], edit: Callable[[bytearray], None] = lambda b: None) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    raw = bytearray(path.read_bytes())
    edit(raw)
    path.write_bytes(raw)
    return path


def claim(size: int) -> Callable[[bytearray], None]:
    """Let the central directory claim this size of the first member."""

    def edit(raw: bytearray) -> None:
        at = raw.index(b"PK\x01\x02")
        raw[at + 24 : at + 28] = struct.pack("<I", size)

    return edit


def npy(x: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f8'") -> bytes:
    """The start of an .npy file."""
    said = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    said += b" " * (-(len(said) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(said)) + said


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_arrays_that_lie(tmp_path: Path) -> None:
    path, x = tmp_path / "x.npz", npy(np.random.default_rng(0).normal(size=(40, 2)))
    plain, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    bomb = npy(np.zeros(2**23))[:200] + bytes(2**26)
    for make, message in [
        (lambda: zip_with(path, deflated, ("x.npy", bomb), edit=claim(2**32 - 2)), r"times its size: a bomb\?"),
        (lambda: zip_with(path, deflated, ("x.npy", bomb), edit=claim(500)), "cannot be read"),
        (lambda: zip_with(path, plain, ("x.npy", x), edit=claim(2**31)), "claims two sizes"),
        (lambda: zip_with(path, zipfile.ZIP_BZIP2, ("x.npy", x)), "compressed by method 12"),
        (lambda: zip_with(path, zipfile.ZIP_LZMA, ("x.npy", x)), "compressed by method 14"),
        (lambda: zip_with(path, plain, ("x.npy", x), ("x.npy", x)), "one name"),
        (lambda: zip_with(path, plain, ("x.npy", x + b"more")), "more bytes than its header says"),
        (lambda: zip_with(path, plain, ("x.npy", x[:-8])), "cannot be read"),
        (lambda: zip_with(path, plain, ("x.npy", header("(1000000000000000,)"))), "cannot be read"),
        (lambda: zip_with(path, plain, ("x.npy", header("(4294967296, 4294967296)"))), "cannot be read"),
        (lambda: zip_with(path, plain, ("readme.txt", b"hello")), "is no array"),
        (lambda: path.write_bytes(x + b"more"), "more bytes than its header says"),
        (lambda: path.write_bytes(header("(1000000000000000, 2)") + x[128:]), "cannot be read"),
        (lambda: path.write_bytes(header("(-1, 2)") + x[128:]), "cannot be read|holds"),
        (lambda: path.write_bytes(header("(__import__('os').getcwd(),)") + x[128:]), "cannot be read"),
        (lambda: path.write_bytes(header("(" * 3000 + ")" * 3000) + x[128:]), "cannot be read"),
        (lambda: path.write_bytes(header("(1099511627776, 0)")), "holds nothing"),
        (lambda: path.write_bytes(header("(0, 1099511627776)")), "holds nothing"),
        (lambda: path.write_bytes(header("(1099511627776, 2)", "'<U0'")), "holds nothing|cannot be read"),
        (lambda: path.write_bytes(header("(40, 2)", "'<U0'")), "real numbers|cannot be read"),
    ]:
        make()
        with pytest.raises(DataError, match=message) as caught:
            datasets.load(path)
        assert str(path) in str(caught.value)


def test_a_flipped_bit_of_an_npz_file_is_found(tmp_path: Path) -> None:
    """A member's checksum is compared, deflated or not."""
    path = tmp_path / "x.npz"
    x = np.random.default_rng(0).integers(9, size=(500, 3)).astype(float)
    for save in (np.savez, np.savez_compressed):
        save(path, x=x)
        whole = path.read_bytes()
        for at in range(200, len(whole) - 200, 61):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(DataError, match="cannot be read as a NumPy file"):
                read_numpy(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return start + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes((min(width, 999) + 1) * min(height, 9)))) + chunk(b"IEND", b"")


def test_pictures_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    text_bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))
    profile_bomb = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27)))
    good = png(9, 9)
    at = good.index(b"IDAT") + 6
    for content, message in [
        (png(2**31 - 1, 2**31 - 1), "claims more than 50,000,000 pixels"),
        (png(8000, 8000), "claims more than 50,000,000 pixels"),
        (png(9, 9, text_bomb), "cannot be read"),
        (png(9, 9, profile_bomb), "cannot be read"),
        (png(9, 9, *[chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(2**20 - 9))) for i in range(100)]), "cannot be read"),
        (good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], "cannot be read"),
        (good[:-16], "cannot be read"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            datasets.load(path)
        assert str(path) in str(caught.value)


def test_a_jpeg_with_thousands_of_scans(tmp_path: Path) -> None:
    path, buffer = tmp_path / "x.jpg", io.BytesIO()
    Image.new("L", (64, 64), 100).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    path.write_bytes(whole)
    assert open_picture(path).size == (64, 64)
    path.write_bytes(whole[:last] + whole[last:-2] * 5000 + whole[-2:])
    with pytest.raises(DataError, match=r"x\.jpg.*scans, expected at most 200"):
        open_picture(path)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    with path.open("wb") as file:
        file.truncate(2**30)  # a hole, all zeros, which takes no room
    with pytest.raises(DataError, match=r"line 1 of '.*x\.csv' has more than 16,777,216 characters"):
        datasets.load(path)
    monkeypatch.setattr(text, "LONGEST", 100)
    (tmp_path / "hepmass").mkdir()
    (tmp_path / "hepmass" / "1000_train.csv").write_text("label\n" + "1," * 100)
    with pytest.raises(DataError, match=r"line 2 of '.*1000_train\.csv' has more than 100 characters"):
        datasets.load("hepmass", root=tmp_path)


@pytest.mark.slow
def test_a_header_of_one_name_for_very_many_columns(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(",".join("a" * 50_000) + "\n" + ",".join("1" * 50_000) + "\n")
    assert text.read_csv(tmp_path / "x.csv")[1][-1] == "a (49999)"  # at once, where counting each would take minutes


def test_digits_parted_by_underscores_are_no_number(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n1_0,3\n")
    with pytest.raises(DataError, match=r"row 3, column 'a'.*'1_0'; expected a number"):
        text.read_csv(tmp_path / "x.csv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, run: Path) -> None:
    for name in ("x.csv", "x.csv.gz", "x.parquet", "x.xlsx", "x.npy", "x.npz", "x.png"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}' does not exist as a file: it is a folder, pipe or device"):
            datasets.load(tmp_path / name)
    (tmp_path / "pictures").mkdir()
    os.mkfifo(tmp_path / "pictures" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg' does not exist as a file"):
        datasets.load(tmp_path / "pictures")
    for name, read in (("reference.pth", lambda p: read_reference(p / "reference.pth")), ("trainer.pt", load_trainer), ("model.safetensors", load), ("config.json", load)):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        with pytest.raises(CheckpointError, match="does not exist as a file"):
            read(run)
    os.mkfifo(run / "result.json")
    os.mkfifo(run / "metrics.jsonl")
    assert read_json(run / "result.json") == {}
    RunLogger(run).cut(3)
    assert (run / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000, b"\xff", b"1" * 5000])
def test_json_that_is_no_result(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    assert read_json(tmp_path / "result.json") == {}
    lines = [b'{"step": 1, "loss": null}', b'{"step": "2"}', b'{"step": {}}', b'{"step": 3}', *content.splitlines()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    journal = RunLogger(tmp_path)
    journal.cut(9)
    assert [row["step"] for row in journal.rows] == [1, 3] and (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def safetensors_file(path: Path, said: Any, data: bytes, length: int | None = None) -> None:
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def parse(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize(
    "lie",
    [
        lambda h, n: h[n].update(shape=[10**18]),
        lambda h, n: h[n].update(shape=[-1]),
        lambda h, n: h[n].update(shape=[2**40, 2**40]),
        lambda h, n: h[n].update(data_offsets=[0, 2**40]),
        lambda h, n: h[n].update(data_offsets=[8, 0]),
        lambda h, n: h[n].update(data_offsets=[-4, 0]),
        lambda h, n: h[n].update(data_offsets=h[next(k for k in h if k not in (n, "__metadata__"))]["data_offsets"]),
        lambda h, n: h[n].update(dtype="F64"),
        lambda h, n: h[n].update(dtype="I32"),
        lambda h, n: h[n].update(dtype="PICKLE"),
        lambda h, n: h[n].update(shape="many"),
        lambda h, n: h.pop(n),
        lambda h, n: h.update({"../../evil": h.pop(n)}),
        lambda h, n: h.pop("__metadata__"),
        lambda h, n: h["__metadata__"].clear(),
        lambda h, n: h["__metadata__"].update(sha256="0" * 64),
        lambda h, n: h.update(__metadata__={"sha256": 5}),
        lambda h, n: h.update(__metadata__=[]),
    ],
)
def test_a_safetensors_header_that_lies(run: Path, lie: Callable[[dict[str, Any], str], Any]) -> None:
    path = run / "model.safetensors"
    said, data = parse(path)
    name = next(k for k in sorted(said) if k != "__metadata__" and np.prod(said[k]["shape"]) > 1)
    lie(said, name)
    safetensors_file(path, said, data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold this model's weights: "):
        load(run)


def test_a_safetensors_header_of_any_length(run: Path) -> None:
    path = run / "model.safetensors"
    said, data = parse(path)
    for length in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        safetensors_file(path, said, data, length)
        with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold"):
            load(run)
    for raw in (b"[" * 200_000, b'{"a":' * 100_000, b"{}", b"null", b"\xff" * 100, b"{" + b" " * 2**20):
        safetensors_file(path, raw, data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold"):
            load(run)


def test_weights_of_another_type_are_not_converted_unsaid(run: Path) -> None:
    flow = INFO.build().double()
    write_weights(run, flow)
    with pytest.raises(CheckpointError, match=r"is torch\.float64; expected torch\.float32"):
        load(run)
    tensors = {k: v.float() + 1 for k, v in flow.state_dict().items()}
    safetensors.torch.save_file(tensors, run / "model.safetensors", {"sha256": weights_digest(tensors)})
    assert torch.equal(next(iter(load(run).state_dict().values())), next(iter(tensors.values())))


def edited(run: Path, edit: Callable[[dict[str, Any]], Any], seal: bool = True) -> None:
    raw = json.loads((run / "config.json").read_text())
    edit(raw)
    raw |= {"sha256": config_digest(raw)} if seal else {}
    (run / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(run="rm -rf"), "unknown field 'run'"),
        (lambda r: r["config"]["solver"].update(__class__="os.system"), "config: solver: unknown field '__class__'"),
        (lambda r: r["config"]["solver"].pop("steer"), "config: solver: field 'steer' is missing"),
        (lambda r: r["config"].update(model=None), "config: model is None; expected an object"),
        (lambda r: r["config"]["train"].update(steps=True), "train: steps is True; expected int"),
        (lambda r: r["config"]["train"].update(lr=False), "train: lr is False; expected float"),
        (lambda r: r["config"]["model"]["field"].update(zero_init=1), "model: field: zero_init is 1; expected bool"),
        (lambda r: r["config"]["train"].update(lr=float("nan")), "train: lr is nan; expected a finite number"),
        (lambda r: r["config"]["solver"].update(eval_rtol=float("inf")), "solver: eval_rtol is inf; expected a finite"),
        (lambda r: r["config"]["train"].update(max_time=float("-inf")), "train: max_time is -inf; expected a finite"),
        (lambda r: r["config"]["train"].update(lr=10**400), "train: lr is a whole number of 1329 bits"),
        (lambda r: r["config"]["train"].update(seed=2**63), "train: seed is a whole number of 64 bits"),
        (lambda r: r["config"]["data"].update(toy_sizes=[1, 2]), r"data: toy_sizes is \[1, 2\]; expected a list of 3"),
        (lambda r: r["config"]["data"].update(data="\ud800"), "data: data is .*expected text"),
        (lambda r: r["config"]["data"].update(data={"a": [1]}), r"data: data is \{'a': \[1\]\}; expected str"),
        (lambda r: r["config"]["model"]["field"].update(hidden=[[[1]]]), r"model: field: hidden is \[\[1\]\]; expected int"),
        (lambda r: r["config"]["model"]["field"].update(hidden=[None]), "model: field: hidden is None; expected int"),
        (lambda r: r["config"]["model"].update(field=[]), r"model: field is \[\]; expected an object"),
        (lambda r: r["config"]["model"]["field"].update(kind=["mlp"]), r"field: kind is \['mlp'\]; expected one of"),
        (lambda r: r["config"]["model"]["field"].update(strides=[1]), "model: field: unknown field 'strides'"),
        (lambda r: r.update(event_shape=[0]), r"event_shape is \(0,\)"),
        (lambda r: r.update(event_shape=[]), r"event_shape is \(\)"),
        (lambda r: r.update(event_shape=[2, 2]), r"event_shape is \(2, 2\)"),
        (lambda r: r.update(levels=256), "levels is 256 with event_shape"),
        (lambda r: r.update(levels=-1, event_shape=[1, 2, 2]), "levels is -1"),
        (lambda r: r.update(context_dim=7), "context_dim is 7"),
        (lambda r: r.update(columns=["x"]), "columns names 1"),
        (lambda r: r.update(classes="abc"), "classes is 'abc'; expected a list"),
        (lambda r: r.update(format=True), "reads format 5"),
        (lambda r: r.update(format=2.0), "reads format 5"),
    ],
)
def test_config_fields_are_refused_by_name(run: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    for seal in (True, False):
        write_config(run, INFO)
        edited(run, edit, seal)
        for read in (load, read_config):
            with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
                read(run)


@pytest.mark.parametrize(
    "content", [b'{"format": 2, "format": 2}', b'{"format": ' + b"9" * 9999 + b"}", b'{"a": ' * 50_000, b"[" * 300 + b"]" * 300, b"\xff", b"\xef\xbb\xbf{}", b"NaN"]
)
def test_json_that_is_no_config(run: Path, content: bytes) -> None:
    (run / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(run)


@pytest.mark.parametrize("depth", [5, 100, 900, 985, *range(955, 1000, 3)])
def test_json_nested_to_the_limit(run: Path, depth: int) -> None:
    raw = (run / "config.json").read_text().replace('"x.npy"', "[" * depth + "]" * depth)
    (run / "config.json").write_text(raw)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(run)


def test_a_config_changed_by_hand_is_not_believed(run: Path) -> None:
    edited(run, lambda r: r["config"]["solver"].update(eval_rtol=0.5), seal=False)
    with pytest.raises(CheckpointError, match=r"config\.json is not what was written: its checksum differs"):
        load(run)
    edited(run, lambda r: r.pop("sha256"), seal=False)
    with pytest.raises(CheckpointError, match="checksum"):
        load(run)


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r["config"]["model"].update(blocks=2**40),
        lambda r: r["config"]["model"]["field"].update(hidden=[8] * 100_000),
        lambda r: r["config"]["model"]["field"].update(hidden=[2**40]),
        lambda r: r["config"]["model"]["field"].update(hidden=[2**62]),
        lambda r: r["config"]["model"]["field"].update(hidden=[-5]),
        lambda r: r["config"]["model"]["base"].update(base_std=-1.0),
        lambda r: r["config"]["model"].update(base={"kind": "mixture", "components": 10**5, "covariance": "full", "train_base": True}) or r.update(event_shape=[10**4], columns=[]),
        lambda r: r["config"]["model"].update(preprocess={"kind": "marginals", "knots": 10**5}) or r.update(event_shape=[2**31], columns=[]),
        lambda r: r.update(event_shape=[2**31], columns=[]),
        lambda r: r.update(event_shape=[3, 2**20, 2**20], columns=[], levels=256),
    ],
)
def test_a_config_that_asks_for_more_than_any_memory(run: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edited(run, edit)
    with pytest.raises(CheckpointError, match=r"config\.json|does not hold this model's weights") as caught:
        load(run)
    assert "unknown field" not in str(caught.value)


def test_torch_files_that_lie(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With true checksums, as a stranger can make them."""
    path, whole = run / "trainer.pt", io.BytesIO()
    torch.save({"step": 1, "w": torch.zeros(2**22)}, whole)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb, zipfile.ZipFile(whole) as given:
        for member in given.infolist():
            bomb.writestr(member.filename, given.read(member))
    bombed = path.read_bytes()
    asks = b"\x80\x02}X\1\0\0\0xcbuiltins\nbytearray\n" + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85Rs."
    asking = io.BytesIO()
    with zipfile.ZipFile(asking, "w") as archive:
        archive.writestr("a/data.pkl", asks)
        archive.writestr("a/version", "3")
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/data.pkl", b"\x80\x02).")
        archive.writestr("a/version", "3")
    for content, message in [(bombed, "compressed by method 8"), (asking.getvalue(), "bytearray"), (script.getvalue(), "TorchScript")]:
        path.write_bytes(content)
        trainer_file._append_checksum(path)
        with pytest.raises(CheckpointError, match=rf"trainer\.pt: .*{message}"):
            load_trainer(run)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"trainer\.pt cannot be read.*{message}"):
            read_reference(path)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:  # torch's first format, unpacked to a folder
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "../evil"
            archive.addfile(member)
    path.write_bytes(tar.getvalue())
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_reference(path)


def test_a_flipped_bit_of_a_reference_checkpoint_is_found(tmp_path: Path) -> None:
    """By the zip file's checksums, which torch itself does not compare."""
    path = tmp_path / "checkpt.pth"
    torch.save({"state_dict": {"w": torch.arange(1000.0)}, "args": argparse.Namespace()}, path)
    whole = path.read_bytes()
    at = whole.index(np.arange(1000, dtype=np.float32).tobytes())
    path.write_bytes(whole[: at + 999] + bytes([whole[at + 999] ^ 1]) + whole[at + 1000 :])
    assert not torch.equal(torch.load(path, weights_only=False)["state_dict"]["w"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        read_reference(path)


def test_limits_are_as_documented() -> None:
    assert pictures.MAX_PIXELS == 50_000_000 and text.LONGEST == 2**24
