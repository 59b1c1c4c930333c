"""CelebA, downsampled ImageNet and CelebA-HQ from the documented layouts, made tiny; prepared files and memory maps."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnf import data as datasets
from cnf.data import arrays, prepared
from cnf.data.rows import is_mapped, keep_rows
from cnf.errors import ConfigError, DataError


def pixels(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Images (n, 3, size, size), all different."""
    return np.random.default_rng(seed).integers(256, size=(n, 3, size, size), dtype=np.uint8)


def png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


def sorted_rows(*parts: Any) -> np.ndarray:
    return np.unique(np.concatenate([np.asarray(p).reshape(len(p), -1) for p in parts]), axis=0)


# --- CelebA ---------------------------------------------------------------------------------------------------------------


def faces(root: Path, n: int = 12, size: tuple[int, int] = (178, 218)) -> list[Path]:
    folder, rng = root / "celeba" / "img_align_celeba", np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines, paths = [], []
    for i in range(n):
        path = folder / f"{i + 1:06d}.jpg"
        Image.fromarray(rng.integers(256, size=(9, 7, 3), dtype=np.uint8)).resize(size).save(path, quality=95)
        lines.append(f"{path.name} {0 if i < n - 4 else 1 if i < n - 2 else 2}")
        paths.append(path)
    (root / "celeba" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return paths


@pytest.mark.parametrize("size", [32, 64, 31, 178])
def test_celeba_is_the_published_resize_and_crop(tmp_path: Path, size: int) -> None:
    from torchvision import transforms  # what AFFJORD's code composes

    paths = faces(tmp_path)
    data = datasets.load("celeba", root=tmp_path, image_size=size)
    truth = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    expected = torch.stack([truth(Image.open(p)) for p in paths])
    assert torch.equal(torch.cat([data.train, data.validation, data.test]), expected)
    assert data.event_shape == (3, size, size) and data.flip and data.levels == 256 and len(data.train) == 8


def test_celeba_from_the_zip_and_again_from_the_prepared_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = faces(tmp_path / "a")
    plain = datasets.load("celeba", root=tmp_path / "a", nbits=5)
    assert plain.levels == 32 and any("figures do not compare" in n for n in plain.notices)
    full = datasets.load("celeba", root=tmp_path / "a")
    assert torch.equal(full.train // 8, plain.train)
    (tmp_path / "b" / "celeba").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "b" / "celeba" / "img_align_celeba.zip", "w") as archive:
        for path in paths:
            archive.write(path, f"img_align_celeba/{path.name}")
        archive.writestr("../../outside.txt", "x")
    (tmp_path / "b" / "celeba" / "list_eval_partition.csv").write_text(
        "image_id,partition\n" + (tmp_path / "a" / "celeba" / "list_eval_partition.txt").read_text().replace(" ", ",")
    )
    packed = datasets.load("celeba", root=tmp_path / "b")
    assert torch.equal(packed.train, full.train) and torch.equal(packed.test, full.test)
    made = {p.relative_to(tmp_path).parts[:3] for p in tmp_path.rglob("*") if p.is_file()} - {("a", "celeba", "img_align_celeba")}
    assert {p[-1] for p in made} == {"list_eval_partition.txt", "list_eval_partition.csv", "img_align_celeba.zip", "prepared"}

    def never(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("cnf.data.celeba.open_picture", never)
    again = datasets.load("celeba", root=tmp_path / "b")
    assert torch.equal(again.validation, full.validation) and any("an earlier run decoded" in n for n in again.notices)
    os.utime(tmp_path / "b" / "celeba" / "img_align_celeba.zip", ns=(1, 1))  # another file: another mark
    with pytest.raises(AssertionError, match="decoded again"):
        datasets.load("celeba", root=tmp_path / "b")


def test_bad_celeba(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list_eval_partition.txt and img_align_celeba not there.*README"):
        datasets.load("celeba", root=tmp_path)
    with pytest.raises(ConfigError, match="image_size must be at most 178"):
        datasets.load("celeba", root=tmp_path, image_size=256)
    paths = faces(tmp_path)
    with pytest.raises(DataError, match="needs labels"):
        datasets.load("celeba", root=tmp_path, condition="label")
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    good = partition.read_text()
    for line, message in (
        ("../../secret.jpg 0", "line 1 .*file name"),
        ("000001.jpg 3", "0, 1 or 2"),
        ("000001.jpg", "0, 1 or 2"),
    ):
        partition.write_text(line + "\n" + good)
        with pytest.raises(DataError, match=message):
            datasets.load("celeba", root=tmp_path)
    partition.write_text("000001.jpg 0\n")
    with pytest.raises(DataError, match=r"got \[1, 0, 0\]"):
        datasets.load("celeba", root=tmp_path)
    partition.write_text(good)
    Image.new("RGB", (64, 64)).save(paths[3])
    os.utime(partition, ns=(5, 5))
    with pytest.raises(DataError, match=r"000004.jpg.* is 64x64; expected the aligned 178x218"):
        datasets.load("celeba", root=tmp_path)
    paths[3].unlink()
    with pytest.raises(DataError, match=r"000004.jpg' does not exist"):
        datasets.load("celeba", root=tmp_path)


def test_bad_zip_files(tmp_path: Path) -> None:
    faces(tmp_path)
    source = tmp_path / "celeba" / "img_align_celeba"
    archive = source.with_suffix(".zip")
    kept = {p.name: p.read_bytes() for p in source.iterdir()}
    for path in source.iterdir():
        path.unlink()
    source.rmdir()
    archive.write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(DataError, match="cannot be read as a zip file"):
        datasets.load("celeba", root=tmp_path)
    with zipfile.ZipFile(archive, "w") as file:
        for name in list(kept)[1:]:
            file.writestr(name, kept[name])
    with pytest.raises(DataError, match=r"lacks the image"):
        datasets.load("celeba", root=tmp_path)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(next(iter(kept)), bytes(2**24 + 1))
    with pytest.raises(DataError, match="claims 16,777,217 bytes"):
        datasets.load("celeba", root=tmp_path)
    assert not list((tmp_path / "celeba").glob("prepared/.*"))  # nothing half-written is left


# --- ImageNet and CelebA-HQ -----------------------------------------------------------------------------------------------

TRAIN, TEST = pixels(60, seed=1), pixels(15, seed=2)


def as_npz_parts(root: Path) -> None:  # the ImageNet authors' own: rows, channel by channel, in several files
    for i in range(11):
        part = TRAIN[6 * i : 6 * i + 6] if i < 9 else TRAIN[54:57] if i == 9 else TRAIN[57:]
        np.savez(root / f"train_data_batch_{i + 1}.npz", data=part.reshape(len(part), -1), labels=np.ones(len(part)), mean=np.zeros(3))
    np.savez(root / "val_data.npz", data=TEST.reshape(len(TEST), -1), labels=np.ones(len(TEST)))


def as_npy(root: Path) -> None:
    np.save(root / "train.npy", TRAIN)
    np.save(root / "validation.npy", TEST)


def as_npy_channels_last(root: Path) -> None:
    np.save(root / "train_32x32.npy", TRAIN.transpose(0, 2, 3, 1))
    np.save(root / "valid_32x32.npy", TEST.transpose(0, 2, 3, 1))


def as_folders(root: Path) -> None:  # PixelRNN's
    for name, images in (("train_32x32", TRAIN), ("valid_32x32", TEST)):
        for i, image in enumerate(images):
            png(root / name / f"{i:07d}.png", image)


def as_class_folders(root: Path) -> None:  # RNODE's
    for name, images in (("train", TRAIN), ("val", TEST)):
        for i, image in enumerate(images):
            png(root / name / f"n{i % 3:08d}" / f"{i}.png", image)


def as_npz_in_folders(root: Path) -> None:
    for name, images in (("train", TRAIN), ("test", TEST)):
        (root / name).mkdir()
        np.savez(root / name / "a.npz", images=images.transpose(0, 2, 3, 1)[:7])
        np.savez(root / name / "b.npz", images=images[7:])


LAYOUTS = [as_npz_parts, as_npy, as_npy_channels_last, as_folders, as_class_folders, as_npz_in_folders]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=[f.__name__ for f in LAYOUTS])
def test_every_layout_gives_the_same_images(
    tmp_path: Path, layout: Any, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mapped:
        monkeypatch.setattr(arrays, "MAP_FROM", 0)
    root = tmp_path / "imagenet32"
    root.mkdir()
    layout(root)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    for nbits in (8, 5, 5):  # the second time from the prepared file
        data = datasets.load("imagenet32", root=tmp_path, nbits=nbits)
        shift = 8 - nbits
        assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 15)
        assert data.event_shape == (3, 32, 32) and data.levels == 2**nbits and not data.flip
        assert np.array_equal(sorted_rows(data.train, data.validation), sorted_rows(TRAIN >> shift))
        assert np.array_equal(sorted_rows(data.test), sorted_rows(TEST >> shift))
        rows = torch.tensor([3, 0, 50])
        assert torch.equal(data.train[rows], torch.stack([data.train[3], data.train[0], data.train[50]]))
        other = datasets.load("imagenet32", root=tmp_path, nbits=nbits, split_seed=1)
        assert not np.array_equal(sorted_rows(other.validation), sorted_rows(data.validation))
    assert {p: p.read_bytes() for p in before} == before  # a map is private: the files stay as they are
    assert any("figures do not compare" in n for n in data.notices)


def test_celebahq_with_a_validation_part_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "celebahq256"
    root.mkdir()
    parts = {name: pixels(12, 256, seed) for seed, name in enumerate(("train", "val", "test"))}
    for name, images in parts.items():
        np.save(root / f"{name}.npy", images)
    data = datasets.load("celeba-hq", root=tmp_path, nbits=5)
    assert data.flip and data.levels == 32
    for x, images in ((data.train, parts["train"]), (data.validation, parts["val"]), (data.test, parts["test"])):
        assert np.array_equal(x.numpy(), images >> 3)


def test_bad_large_sets(tmp_path: Path) -> None:
    root = tmp_path / "imagenet64"

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            datasets.load("imagenet64", root=tmp_path)

    refused("no such folder.*README")
    root.mkdir()
    refused("got nothing")
    np.save(root / "train.npy", pixels(20, 64))
    refused(r"got train\.npy")
    np.save(root / "val.npy", pixels(5, 32))
    refused(r"val\.npy.* = \(3, 64, 64\), got \(3, 32, 32\)")
    np.save(root / "val.npy", pixels(5, 64)[:, :1])
    refused(r"\(1, 64, 64\)")
    np.save(root / "val.npy", pixels(5, 64) / 255.0)
    refused("must hold uint8 images .*, got float64")
    np.save(root / "val.npy", pixels(5, 64).reshape(5, -1)[:, :100])
    refused(r"shape \(5, 100\)")
    np.save(root / "val.npy", np.array([{}]), allow_pickle=True)
    refused("can run code")
    np.savez(root / "val.npz", y=pixels(5, 64))
    (root / "val.npy").unlink()
    refused(r"keys \['y'\]")
    (root / "val.npz").unlink()
    (root / "val").mkdir()
    refused("either images or arrays, got neither")
    png(root / "val" / "a.png", pixels(1, 48)[0])
    refused(r"a\.png' is 48x48; imagenet64 has 64x64.*image_size=64")
    png(root / "val" / "a.png", pixels(1, 64)[0])
    np.save(root / "val" / "b.npy", pixels(5, 64))
    refused("either images or arrays, got both")
    (root / "val" / "b.npy").unlink()
    np.save(root / "train.npy", pixels(9, 64))
    refused("9 training images")


# --- prepared files and memory maps ---------------------------------------------------------------------------------------


def test_prepared_file_is_whole_or_not_there(tmp_path: Path) -> None:
    images, shape = pixels(10), (3, 32, 32)

    def blocks(upto: int) -> Any:
        for i in range(upto):
            yield images[i : i + 1]
        if upto < 10:
            raise DataError("broken source")

    with pytest.raises(DataError, match="broken source"):
        prepared.prepare(tmp_path / "p", "train", "a", lambda: blocks(4), shape, 8)
    assert list((tmp_path / "p").iterdir()) == []
    found, said = prepared.prepare(tmp_path / "p", "train", "a", lambda: blocks(10), shape, 8)
    assert np.array_equal(found, images) and "decoded once" in said[0]
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["train-a.npy"]
    assert np.array_equal(np.load(tmp_path / "p" / "train-a.npy"), images)
    found, _ = prepared.prepare(tmp_path / "p", "train", "a", lambda: blocks(0), shape, 8)
    assert np.array_equal(found, images)
    (tmp_path / "file").write_text("in the way")
    found, said = prepared.prepare(tmp_path / "file", "train", "a", lambda: blocks(10), shape, 5)
    assert np.array_equal(found, images // 8) and "into memory" in said[0]
    with pytest.raises(DataError, match=r"damaged.*delete"):
        prepared.prepare(tmp_path / "p", "train", "a", lambda: blocks(10), (3, 16, 16), 8)
    with pytest.raises(DataError, match="at least one image, got none"):
        prepared.prepare(tmp_path / "q", "train", "a", lambda: iter(()), shape, 8)
    with pytest.raises(DataError, match="must be uint8"):
        prepared.prepare(tmp_path / "q", "train", "a", lambda: blocks(10), (1, 32, 32), 8)


def test_stamp_changes_with_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    paths = [tmp_path / "train"]
    first = prepared.stamp(paths, 32)
    assert first == prepared.stamp(paths, 32) != prepared.stamp(paths, 64)
    os.utime(tmp_path / "train" / "cat", ns=(7, 7))
    second = prepared.stamp(paths, 32)
    np.save(tmp_path / "train" / "a.npy", np.zeros(3))
    third = prepared.stamp(paths, 32)
    mtime = (tmp_path / "train").stat().st_mtime_ns
    np.save(tmp_path / "train" / "a.npy", np.zeros(4))  # written in place
    os.utime(tmp_path / "train", ns=(mtime, mtime))
    assert len({first, second, third, prepared.stamp(paths, 32)}) == 4


@pytest.mark.parametrize("channels_last", [False, True])
def test_own_large_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    x = pixels(200, 8)
    twice = np.concatenate([x, x[:30]])
    np.save(tmp_path / "x.npy", twice.transpose(0, 2, 3, 1) if channels_last else twice)
    before = (tmp_path / "x.npy").read_bytes()
    plain = datasets.load(tmp_path / "x.npy")
    monkeypatch.setattr(arrays, "MAP_FROM", 0)
    data = datasets.load(tmp_path / "x.npy")
    assert torch.equal(data.validation, plain.validation) and torch.equal(data.test, plain.test)
    assert len(data.train) == len(plain.train) and np.array_equal(sorted_rows(data.train), sorted_rows(plain.train))
    few = datasets.load(tmp_path / "x.npy", nbits=3)
    assert np.array_equal(sorted_rows(few.train), sorted_rows(plain.train >> 5)) and any("into memory" in n for n in few.notices)
    data.train[0] = 0
    assert (tmp_path / "x.npy").read_bytes() == before


def test_keep_rows_of_a_map(tmp_path: Path) -> None:
    x = np.arange(5000, dtype=np.uint8).reshape(-1, 1) + np.zeros(4, np.uint8)
    x[:, 1] = np.arange(5000) // 256
    np.save(tmp_path / "x.npy", x)
    for kept in (np.random.default_rng(0).permutation(5000)[:3100], np.arange(5000), np.array([4999]), np.arange(10)):
        mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
        rows, order = keep_rows(mapped, kept)
        assert is_mapped(rows) and not is_mapped(np.array(rows)) and np.shares_memory(rows, mapped)
        assert np.array_equal(rows, x[order]) and np.array_equal(np.sort(order), np.sort(kept))
        plain, same = keep_rows(x, kept)
        assert np.array_equal(plain, x[kept]) and np.array_equal(same, kept)
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)


# --- Tiny ImageNet --------------------------------------------------------------------------------------------------------


def test_tiny_imagenet_is_read_with_its_labels(tmp_path: Path) -> None:
    root, classes = tmp_path / "tiny-imagenet-200", ("n01", "n02")
    images = pixels(24, 64)
    for i, image in enumerate(images[:20]):
        png(root / "train" / classes[i % 2] / "images" / f"{i}.png", image)
    for i, image in enumerate(images[20:]):
        png(root / "val" / "images" / f"val_{i}.png", image)
    lines = [f"val_{i}.png\t{classes[i // 2]}\t0\t0\t9\t9" for i in range(4)]
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(lines) + "\n")
    data = datasets.load("tiny-imagenet", root=tmp_path, condition="label")
    assert data.event_shape == (3, 64, 64) and data.classes == classes and (len(data.train), len(data.validation)) == (18, 2)
    assert np.array_equal(data.test, images[20:])
    assert data.test_context is not None and data.test_context.argmax(1).tolist() == [0, 0, 1, 1]
    for part, context in ((data.train, data.train_context), (data.validation, data.validation_context)):
        assert context is not None
        for image, label in zip(part, context.argmax(1), strict=True):
            place = next(i for i in range(20) if np.array_equal(images[i], image))
            assert place % 2 == int(label)
    png(root / "train" / "n02" / "images" / "7.png", pixels(1, 70)[0])
    said = r"64x64 in '.*' and 70x70 in 'n02.images.7\.png'; those of Tiny ImageNet are 64x64: unpack its archive again, or resize the odd files to that"
    with pytest.raises(DataError, match=said):
        datasets.load("tiny-imagenet", root=tmp_path)
    png(root / "train" / "n02" / "images" / "7.png", images[7])  # what the message advises
    assert torch.equal(datasets.load("tiny-imagenet", root=tmp_path).train, data.train)
    annotations.write_text("val_0.png\tn09\n")
    with pytest.raises(DataError, match="expected the name of a file and of a class"):
        datasets.load("tiny-imagenet", root=tmp_path)
    annotations.unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt', which is missing"):
        datasets.load("tiny-imagenet", root=tmp_path)
