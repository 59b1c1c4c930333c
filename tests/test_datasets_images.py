"""Small image sets and the user's own pictures: exact pixels, splits and labels, and every bad input's message."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import rows_of, same_rows, shared
from PIL import Image

from cnf import data as datasets
from cnf.errors import ConfigError, DataError

# --- named sets -----------------------------------------------------------------------------------------------------------


def test_digits_protocol() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=540, random_state=0, stratify=y)
    train_x, val_x, _, val_y = train_test_split(rest_x, rest_y, test_size=180, random_state=0, stratify=rest_y)
    data = datasets.load("digits", seed=5, split_seed=7, condition="label")
    for part, expected in ((data.train, train_x), (data.validation, val_x), (data.test, test_x)):
        assert part.dtype == torch.uint8 and np.array_equal(part.numpy().reshape(-1, 64), expected)
    assert data.event_shape == (1, 8, 8) and data.levels == 17 and len(data.train) == 1077
    assert data.classes == tuple("0123456789") and data.context_dim == 10 and not data.flip
    for context, labels in ((data.validation_context, val_y), (data.test_context, test_y)):
        assert context is not None and context.dtype == torch.float32
        assert (context.sum(1) == 1).all() and np.array_equal(context.argmax(1).numpy(), labels)
    few = datasets.load("digits", condition="label", limit=50)
    assert few.train_context is not None and few.train_context.shape == (50, 10) and len(few.test) == 540


def test_mnist_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    # independent truth: the bytes behind the 16-byte header of the official files
    raw = shared("mnist/MNIST/raw")
    (tmp_path / "MNIST").mkdir()
    shutil.copytree(raw, tmp_path / "MNIST" / "raw", copy_function=shutil.copyfile)
    (tmp_path / "MNIST" / "raw").chmod(0o755)
    train, test = (
        np.frombuffer(gzip.decompress((raw / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        for part in ("train", "t10k")
    )
    labels = np.frombuffer(gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    data = datasets.load("mnist", root=tmp_path, condition="label", split_seed=3)
    assert data.event_shape == (1, 28, 28) and data.levels == 256 and not data.flip
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 10_000, 10_000)
    assert np.array_equal(data.test.numpy().ravel(), test)
    assert data.test_context is not None and np.array_equal(data.test_context.argmax(1).numpy(), labels)
    order = np.random.default_rng(3).permutation(60_000)
    pixels = train.reshape(60_000, 1, 28, 28)
    assert np.array_equal(data.validation.numpy(), pixels[order[:10_000]])
    assert np.array_equal(data.train.numpy(), pixels[order[10_000:]])
    few = datasets.load("mnist", root=tmp_path, nbits=5, limit=1000, split_seed=3, download=False)
    assert few.levels == 32 and len(few.train) == 1000 and torch.equal(few.test, data.test // 8)
    # a file cut short by an interrupted unpacking
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="delete what is damaged"):
        datasets.load("mnist", root=tmp_path, download=False)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Any) -> None:
    """torchvision's class, with arrays of ours: its own readers accept the official files only (md5)."""
    import torchvision.datasets as module

    def make(root: str, download: bool, train: bool = True, split: str = "train") -> SimpleNamespace:
        return parts["train" if train and split == "train" else "test"]

    monkeypatch.setattr(module, name, make)


def colour(n: int, channels_last: bool) -> np.ndarray:
    return np.random.default_rng(n).integers(256, size=(n, 32, 32, 3) if channels_last else (n, 3, 32, 32), dtype=np.uint8)


def python2_batch(x: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and the NumPy of its day pickled it: {'data': uint8 (N, 3072), 'labels': [...]}."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s

    def number(n: int) -> bytes:
        return b"J" + n.to_bytes(4, "little", signed=True)

    raw = x.reshape(len(x), -1).tobytes()
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNN" + number(-1) * 2 + b"K\0tb"
    state = b"(K\1" + number(len(x)) + number(3072) + b"\x86" + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text(b"b") + b"tR" + state
    classes = b"](" + b"".join(number(n) for n in labels) + b"e"
    return b"\x80\x02}(" + text(b"batch_label") + text(b"a batch") + text(b"labels") + classes + text(b"data") + array + b"u."


def cifar10(monkeypatch: pytest.MonkeyPatch, root: Path, contents: dict[str, bytes], archive: bool) -> None:
    """A data root with these batches, the published checksums exchanged for theirs."""
    from torchvision.datasets import CIFAR10

    root.mkdir(exist_ok=True)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if n != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    if archive:
        path = root / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
        return
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("archive", [False, True])
def test_cifar10_is_flipped_in_training_and_channels_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: bool) -> None:
    train, test = colour(5100, False), colour(40, False)
    labels = np.arange(5100) % 10
    parts = {f"data_batch_{i}": python2_batch(train[i::2], labels[i::2].tolist()) for i in (0, 1)}
    cifar10(monkeypatch, tmp_path, parts | {"test_batch": python2_batch(test, [3] * 40)}, archive)
    data = datasets.load("cifar10", root=tmp_path, condition="label", download=False)
    assert data.flip and data.event_shape == (3, 32, 32) and data.classes[3] == "cat"
    assert np.array_equal(data.test.numpy(), test) and len(data.validation) == 5000
    order = np.random.default_rng(0).permutation(5100)
    joined, codes = (np.concatenate([v[0::2], v[1::2]]) for v in (train, labels))
    assert np.array_equal(data.train.numpy(), joined[order[5000:]])
    assert data.train_context is not None and np.array_equal(data.train_context.argmax(1).numpy(), codes[order[5000:]])
    assert not datasets.load("cifar10", root=tmp_path, flip=False, download=False).flip
    path = tmp_path / ("cifar-10-python.tar.gz" if archive else "cifar-10-batches-py/data_batch_1")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="is not the published file: its checksum differs"):
        datasets.load("cifar10", root=tmp_path, download=False)


def test_svhn(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {k: SimpleNamespace(data=colour(n, False), labels=np.arange(n) % 10) for k, n in (("train", 5100), ("test", 30))}
    stand_in(monkeypatch, "SVHN", **parts)
    data = datasets.load("svhn", nbits=3)
    assert not data.flip and data.levels == 8 and np.array_equal(data.test.numpy(), parts["test"].data >> 5)
    parts["train"].data = parts["train"].data[:, :, :28]
    with pytest.raises(DataError, match=r"\(3, 28, 32\).*expected \(3, 32, 32\)"):
        datasets.load("svhn")
    parts["train"].data, parts["train"].labels = colour(4000, False), np.arange(4000) % 10
    with pytest.raises(DataError, match="more than 5000"):
        datasets.load("svhn")


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision.datasets.mnist as module

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"cannot be unpacked.*can be written"):
        datasets.load("mnist", root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "svhn"])
def test_missing_images_name_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"(?s){tmp_path.name}.*download=False"):
        datasets.load(name, root=tmp_path, download=False)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.mnist as module

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    with pytest.raises(DataError, match="downloading it failed"):
        datasets.load("mnist", root=tmp_path)


# --- arrays ---------------------------------------------------------------------------------------------------------------


def images(n: int = 40, shape: tuple[int, ...] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, *shape), dtype=np.uint8)


@pytest.mark.parametrize(("shape", "event"), [((6, 5), (1, 6, 5)), ((6, 5, 3), (3, 6, 5)), ((3, 6, 5), (3, 6, 5)), ((6, 5, 1), (1, 6, 5))])
def test_image_arrays(tmp_path: Path, shape: tuple[int, ...], event: tuple[int, ...]) -> None:
    x = images(shape=shape)
    np.save(tmp_path / "x.npy", x)
    data = datasets.load(tmp_path / "x.npy")
    assert data.kind == "image" and data.event_shape == event and data.levels == 256 and data.train.dtype == torch.uint8
    assert same_rows(data, x.transpose(0, 3, 1, 2) if len(shape) == 3 and shape[-1] == 3 else x)
    assert datasets.load(tmp_path / "x.npy", nbits=3).levels == 8
    assert int(datasets.load(tmp_path / "x.npy", nbits=3).train.max()) == 7


def test_npz_labels_and_class_order(tmp_path: Path) -> None:
    x, labels = images(60), np.arange(60) % 12
    np.savez(tmp_path / "x.npz", images=x, labels=labels)
    data = datasets.load(tmp_path / "x.npz", condition="label")
    assert data.classes == tuple(map(str, range(12)))  # numerically, not "10" before "2"
    lookup = {row.tobytes(): k for row, k in zip(x.reshape(60, -1), labels, strict=True)}
    assert data.test_context is not None
    for image, context in zip(data.test, data.test_context, strict=True):
        assert context.sum() == 1 and lookup[image.numpy().tobytes()] == int(context.argmax())
    assert datasets.load(tmp_path / "x.npz").test_context is None
    np.savez(tmp_path / "s.npz", x=np.random.default_rng(0).normal(size=(60, 3)), labels=np.array(["dog", "cat", "bird"])[labels % 3], spare=np.zeros(1))
    text = datasets.load(tmp_path / "s.npz", condition="label")
    assert text.classes == ("bird", "cat", "dog") and any("spare" in n for n in text.notices)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_nbits_keeps_the_highest_bits(tmp_path: Path, nbits: int) -> None:
    x = images(40)
    np.save(tmp_path / "x.npy", x)
    data = datasets.load(tmp_path / "x.npy", nbits=nbits)
    assert data.levels == 2**nbits and same_rows(data, x // 2 ** (8 - nbits))


@pytest.mark.parametrize(
    ("convert", "notice"),
    [
        (lambda x: x.astype(np.int64), "whole numbers of type int64"),
        (lambda x: x.astype(np.float32), "whole numbers of type float32"),
        (lambda x: x.astype(np.float32) / 255, "floats k/255"),
        (lambda x: x / 255.0, "floats k/255"),
        (lambda x: (x / 255.0).astype(np.float16), "floats k/255"),
        (lambda x: torch.from_numpy(x).float().div(255).numpy(), "floats k/255"),  # what ToTensor does
    ],
)
def test_lossless_conversion_to_grey_levels(tmp_path: Path, convert: Any, notice: str) -> None:
    x = np.arange(256 * 30, dtype=np.uint64).reshape(30, 16, 16).astype(np.uint8)  # every grey level
    x = x ^ np.arange(30, dtype=np.uint8)[:, None, None]
    np.save(tmp_path / "x.npy", convert(x))
    data = datasets.load(tmp_path / "x.npy")
    assert data.train.dtype == torch.uint8 and same_rows(data, x) and any(notice in n for n in data.notices)


F = images(30).astype(np.float32)
BAD_IMAGES = [
    (F / 255 * 1.01, "got floats from 0 to 1.01 that are no whole grey levels"),
    (F / 255 - 0.1, r"must be uint8 grey levels 0 to 255, or floats in \[0, 1\], got values from -0.1 to"),
    (F * 1.001, "values from 0 to 255.2"),
    (F * 0.9, "got floats from 0 to 229.5 that are no whole grey levels"),
    ((F + 0.5) / 256, "must be multiples of 1/255"),
    (np.where(F.max() == F, np.nan, F) / 255, "NaN or infinite"),
    (F.astype(np.int16) * 2, "values from 0 to 510"),
    (F > 100, "dtype bool.*nbits=1"),
    (F.astype(complex), "dtype complex64|dtype complex128"),
    (images(20, (6, 5, 4)), r"on one of the two axes, got \(20, 6, 5, 4\).*x\[..., :-1\] drops it"),
    (images(20, (2, 6, 5)), r"on one of the two axes, got \(20, 2, 6, 5\)"),
    (images(20, (3, 6, 3)), "on only one of the two axes"),
    (images(20, (0, 5)), "at least one pixel"),
    (images(9), "9 rows.*at least 10"),
]


@pytest.mark.parametrize(("array", "message"), BAD_IMAGES, ids=[m[:24] for _, m in BAD_IMAGES])
def test_bad_image_arrays(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=message):
        datasets.load(tmp_path / "x.npy")


def test_dark_images_and_flattened_ones_are_pointed_out(tmp_path: Path) -> None:
    np.save(tmp_path / "dark.npy", images() // 16)
    assert any("highest grey level is 15" in n for n in datasets.load(tmp_path / "dark.npy").notices)
    flat = images(40, (10, 10)).reshape(40, -1)
    flat[:, 0] = 0
    np.save(tmp_path / "flat.npy", flat)
    with pytest.raises(DataError, match=r"constant.*flattened images"):
        datasets.load(tmp_path / "flat.npy")


def test_duplicate_images_go_unless_their_labels_differ(tmp_path: Path) -> None:
    x = images(40, (20, 20))  # wide rows are compared by a digest
    twice = np.concatenate([x, x[:7]])
    np.save(tmp_path / "x.npy", twice)
    data = datasets.load(tmp_path / "x.npy")
    assert len(rows_of(data)) == 40 and same_rows(data, x) and any(n.startswith("7 exact duplicate") for n in data.notices)
    assert len(rows_of(datasets.load(tmp_path / "x.npy", duplicates="keep"))) == 47
    np.savez(tmp_path / "x.npz", images=twice, labels=np.r_[np.zeros(40, int), 0, 0, 1, 1, 1, 1, 1])
    assert len(rows_of(datasets.load(tmp_path / "x.npz", condition="label"))) == 45


@pytest.mark.parametrize("keys", [("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("images_{}", "labels_{}")])
@pytest.mark.parametrize("validation", [None, "val", "validation"])
def test_split_inside_an_npz(tmp_path: Path, keys: tuple[str, str], validation: str | None) -> None:
    x, labels = images(80), np.arange(80) % 3
    parts = {"train": slice(0, 50), "test": slice(50, 70)} | ({validation: slice(70, 80)} if validation else {})
    arrays = {keys[0].format(p): x[s] for p, s in parts.items()}
    arrays |= {keys[1].format(p): labels[s, None] for p, s in parts.items()}  # (N, 1), as some sets have them
    np.savez(tmp_path / "x.npz", **arrays)
    share = {} if validation else {"validation_fraction": 0.2}
    data = datasets.load(tmp_path / "x.npz", condition="label", **share)
    assert np.array_equal(data.test[:, 0], x[50:70]) and data.test_context is not None
    assert np.array_equal(data.test_context.argmax(1), labels[50:70])
    if validation:
        assert np.array_equal(data.train[:, 0], x[:50]) and np.array_equal(data.validation[:, 0], x[70:])
        return
    assert (len(data.train), len(data.validation)) == (40, 10) and any("training part by split_seed 0" in n for n in data.notices)
    assert np.array_equal(np.unique(np.concatenate([data.train, data.validation]).reshape(50, -1), axis=0),
                          np.unique(x[:50].reshape(50, -1), axis=0))  # fmt: skip
    lookup = {row.tobytes(): k for row, k in zip(x, labels, strict=True)}
    for part, context in ((data.train, data.train_context), (data.validation, data.validation_context)):
        assert context is not None
        assert [lookup[row.numpy().tobytes()] for row in part] == context.argmax(1).tolist()


def test_a_file_pair_is_a_split(tmp_path: Path) -> None:
    x, labels = images(70), np.array(["cat", "dog"])[np.arange(70) % 2]
    (tmp_path / "pair").mkdir()
    np.savez(tmp_path / "pair" / "train_10k.npz", images=x[:50], labels=labels[:50])
    np.savez(tmp_path / "pair" / "test.npz", images=np.concatenate([x[50:], x[:3]]), labels=np.r_[labels[50:], labels[:3]])
    data = datasets.load(tmp_path / "pair", condition="label", split_seed=4)
    assert np.array_equal(data.test[:20, 0], x[50:]) and data.classes == ("cat", "dog") and data.test_context is not None
    assert data.test_context[:, 1].tolist() == [*(i % 2 for i in range(50, 70)), 0, 1, 0]
    assert any("3 exact duplicate rows kept" in n and "3 of them in the test part" in n for n in data.notices)
    np.savez(tmp_path / "pair" / "val.npz", images=x[:5])
    with pytest.raises(DataError, match=r"some parts .* have labels and others none"):
        datasets.load(tmp_path / "pair")
    np.savez(tmp_path / "pair" / "val.npz", images=images(5, (6, 6)), labels=labels[:5])
    with pytest.raises(DataError, match="differ in the shape"):
        datasets.load(tmp_path / "pair")
    np.savez(tmp_path / "pair" / "val.npz", x_train=x, x_test=x)
    with pytest.raises(DataError, match="its own split"):
        datasets.load(tmp_path / "pair")
    np.savez(tmp_path / "pair" / "val.npz", images=x[:0], labels=labels[:0])
    with pytest.raises(DataError, match=r"at least one pixel|validation part .* is empty"):
        datasets.load(tmp_path / "pair")


def test_real_cifar_parts(tmp_path: Path) -> None:
    path = shared("cifar10/train_10k.npz")
    with np.load(path) as file:
        x, labels = file["images"], file["labels"]
    data = datasets.load(path, condition="label")
    assert data.event_shape == (3, 32, 32) and len(data.classes) == 10 and len(rows_of(data)) == 10_000
    lookup = {row.tobytes(): int(k) for row, k in zip(x, labels, strict=True)}
    assert data.test_context is not None
    found = [lookup[row.tobytes()] for row in data.test.numpy().transpose(0, 2, 3, 1)]
    assert found == data.test_context.argmax(1).tolist()


# --- folders --------------------------------------------------------------------------------------------------------------


def folder(path: Path, classes: tuple[str, ...] = ("b", "a", "c"), mode: str = "L", size: tuple[int, int] = (5, 6),
           seed: int = 0) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            pixels = rng.integers(256, size=(*size, 3) if mode == "RGB" else size, dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")


def test_folder(tmp_path: Path) -> None:
    folder(tmp_path / "grey")
    data = datasets.load(tmp_path / "grey", condition="label")
    assert data.event_shape == (1, 5, 6) and data.classes == ("a", "b", "c") and data.context_dim == 3
    pixels = {np.asarray(Image.open(p)).tobytes(): p.parent.name for p in (tmp_path / "grey").rglob("*.png")}
    assert data.train_context is not None
    for image, context in zip(data.train, data.train_context, strict=True):
        assert pixels[image.numpy().tobytes()] == data.classes[int(context.argmax())]
    folder(tmp_path / "colour", ("",), "RGB")
    assert datasets.load(tmp_path / "colour").event_shape == (3, 5, 6)
    folder(tmp_path / "colour" / "", ("",), size=(9, 7))
    small = datasets.load(tmp_path / "colour", image_size=4)
    assert small.event_shape == (1, 4, 4) and any("cropped" in n for n in small.notices)


def test_folder_with_a_split(tmp_path: Path) -> None:
    for part, seed in (("train", 1), ("val", 2), ("test", 3)):
        folder(tmp_path / part, ("cat", "dog"), "RGB", seed=seed)
    data = datasets.load(tmp_path, condition="label")
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 24, 24) and data.classes == ("cat", "dog")
    truth = {np.asarray(Image.open(p)).tobytes(): p.parts[-3:-1] for p in tmp_path.rglob("*.png")}
    for part, x, context in (("train", data.train, data.train_context), ("val", data.validation, data.validation_context)):
        assert context is not None
        for image, row in zip(x, context, strict=True):
            assert truth[image.permute(1, 2, 0).numpy().tobytes()] == (part, data.classes[int(row.argmax())])
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(DataError, match=r"no test part.*rename"):
        datasets.load(tmp_path)
    (tmp_path / "val").rename(tmp_path / "car")  # "train" among other classes is a class
    assert datasets.load(tmp_path / "train", condition="label").classes == ("cat", "dog")
    flat = tmp_path / "vehicles"
    for name in ("train", "test", "car"):
        folder(flat / name, ("",))
    assert datasets.load(flat, condition="label").classes == ("car", "test", "train")


def test_grey_becomes_colour_at_the_first_colour_picture(tmp_path: Path) -> None:
    folder(tmp_path, ("",))
    rgb = np.random.default_rng(5).integers(256, size=(5, 6, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "5.png")  # in the middle of 0.png to 11.png
    data = datasets.load(tmp_path)
    truth = {np.asarray(Image.open(p).convert("RGB")).tobytes() for p in tmp_path.glob("*.png")}
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in torch.cat([data.train, data.validation, data.test])} == truth
    assert len(truth) == 12 and any("mixed" in n for n in data.notices)


def test_central_square_is_what_is_kept(tmp_path: Path) -> None:
    for i in range(12):
        wide = np.zeros((8, 20), np.uint8)
        wide[:, 6:14] = 100 + i  # the central square is one grey; resizing cannot change it
        Image.fromarray(wide).save(tmp_path / f"{i}.png")
    data = datasets.load(tmp_path, image_size=4)
    assert data.event_shape == (1, 4, 4)
    assert sorted(int(x.unique()) for x in torch.cat([data.train, data.validation, data.test])) == list(range(100, 112))


def test_orientation_transparency_and_other_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        picture = Image.fromarray(rng.integers(256, size=(4, 7, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        picture.save(tmp_path / f"{i}.png", exif=exif)
    (tmp_path / "notes.gif").write_bytes(b"")
    data = datasets.load(tmp_path)
    assert data.event_shape == (3, 7, 4) and any("ignored (notes.gif" in n for n in data.notices)
    stored = {np.rot90(np.asarray(Image.open(p)), -1).tobytes() for p in tmp_path.glob("*.png")}
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in torch.cat([data.train, data.validation, data.test])} == stored
    (tmp_path / "alpha").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(256, size=(4, 7, 4), dtype=np.uint8)).save(tmp_path / "alpha" / f"{i}.png")
    assert any(n.startswith("12 images have transparency") for n in datasets.load(tmp_path / "alpha").notices)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        datasets.load(tmp_path / "empty")
    np.save(tmp_path / "empty" / "a.npy", images())
    with pytest.raises(DataError, match=r"a\.npy, give the file itself"):
        datasets.load(tmp_path / "empty")
    (tmp_path / "gif").mkdir()
    (tmp_path / "gif" / "a.gif").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.gif is not one"):
        datasets.load(tmp_path / "gif")
    folder(tmp_path / "mixed", ("a",))
    folder(tmp_path / "mixed", ("b",), size=(7, 7))
    with pytest.raises(DataError, match=r"6x5.*7x7.*image_size"):
        datasets.load(tmp_path / "mixed")
    Image.new("L", (6, 5)).save(tmp_path / "mixed" / "loose.png")
    with pytest.raises(DataError, match="got both"):
        datasets.load(tmp_path / "mixed")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    with pytest.raises(DataError, match=r"a\.png.*cannot be read"):
        datasets.load(tmp_path / "broken")
    whole = io.BytesIO()
    Image.fromarray(images(1, (60, 60))[0]).save(whole, "JPEG")
    (tmp_path / "broken" / "a.png").write_bytes(whole.getvalue()[:300])
    with pytest.raises(DataError, match=r"a\.png.*cannot be read"):
        datasets.load(tmp_path / "broken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True, "path": "t.npy"}, "flip do not apply"),
        ({"nbits": 5, "path": "t.npy"}, "nbits and flip do not apply"),
        ({"image_size": 4, "path": "x.npy"}, "folder of images"),
        ({"path": "moons", "flip": True}, "is for images"),
        ({"path": "digits", "duplicates": "keep"}, "your own data"),
        ({"path": "digits", "validation_fraction": 0.2}, "your own data"),
        ({"path": "digits", "discrete": "keep"}, "your own tables"),
        ({"path": "digits", "sizes": (5, 5, 5)}, "toy sets"),
        ({"path": "x.npy", "invert": True}, "density of an image"),
        ({"path": "two.npy", "test_fraction": 0.2}, "test_fraction=0.2 does not apply, since the data bring their own"),
        ({"path": "three.npy", "validation_fraction": 0.2}, "validation_fraction=0.2 does not apply"),
        ({"path": "three.npy", "split_seed": 3}, "split_seed=3 does not apply"),
    ],
)
def test_options_that_would_do_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "x.npy", images())
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(40, 2)))
    for name, parts in (("two", ("train", "test")), ("three", ("train", "val", "test"))):
        (tmp_path / f"{name}.npy").mkdir()  # a folder, whatever it is called
        for part in parts:
            np.save(tmp_path / f"{name}.npy" / f"{part}.npy", images())
    path = options.pop("path")
    with pytest.raises(ConfigError, match=message):
        datasets.load(tmp_path / path if path.endswith(".npy") else path, **options)


def test_flip_of_own_images(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images())
    assert not datasets.load(tmp_path / "x.npy").flip and datasets.load(tmp_path / "x.npy", flip=True).flip


def test_a_folder_of_masks_is_almost_black(tmp_path: Path) -> None:
    for i in range(12):
        mask = np.random.default_rng(i).integers(0, 2, (4, 6)).astype(np.uint8)
        for folder, white in (("masks", 1), ("images", 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(white * mask).save(tmp_path / folder / f"{i}.png")
    assert any("the highest grey level is 1, almost black" in line for line in datasets.load(str(tmp_path / "masks")).notices)
    assert not any("almost black" in line for line in datasets.load(str(tmp_path / "images")).notices)
