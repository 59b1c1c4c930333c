"""Image files: every format gives the exact pixels, and deeper, animated or many-paged files are refused by name."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnf import data as datasets
from cnf.data.folders import read_folder
from cnf.data.items import read_items
from cnf.data.pictures import open_picture
from cnf.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(256, size=(6, 5), dtype=np.uint8)
COLOUR = RNG.integers(256, size=(6, 5, 3), dtype=np.uint8)


def png(depth: int, kind: int, rows: np.ndarray) -> bytes:
    """A PNG file of samples as they stand (big-endian), written by hand: Pillow writes no 16-bit colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(width: int, height: int, data: bytes, photometric: int, bits: list[int], order: str = "<", **tags: list[int]) -> bytes:
    """An uncompressed TIFF file in one strip, written by hand; further tags by number, as ``t338=[0]``."""
    known = {256: [width], 257: [height], 258: bits, 259: [1], 262: [photometric], 273: [0], 277: [len(bits)], 278: [height], 279: [len(data)]}
    known |= {int(name[1:]): values for name, values in tags.items()}
    entries, values = b"", b""
    start = 8 + 2 + 12 * len(known) + 4
    after = sum(4 * len(v) for v in known.values() if len(v) > 1)
    known[273] = known[273] if known[273] != [0] else [start + after]
    for tag, numbers in sorted(known.items()):  # all of them LONGs
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        place = packed if len(numbers) == 1 else struct.pack(f"{order}I", start + len(values))
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + place
        values += packed if len(numbers) > 1 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", len(known))
    return head + entries + bytes(4) + values + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- exact pixels ---------------------------------------------------------------------------------------------------------

LOSSLESS: dict[str, dict[str, Any]] = {
    "a.png": {}, "a.webp": {"lossless": True}, "a.bmp": {}, "a.tif": {}, "a.tiff": {"compression": "tiff_lzw"},
    "b.TIF": {"compression": "tiff_adobe_deflate"}, "c.tif": {"compression": "packbits"},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_exact_pixels(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "colour"
    folder.mkdir()
    Image.fromarray(COLOUR).save(folder / name, **LOSSLESS[name])
    assert np.array_equal(read_folder(folder).x, COLOUR.transpose(2, 0, 1)[None])
    assert np.array_equal(read_items([folder / name], (3, 6, 5), 256).x, COLOUR.transpose(2, 0, 1)[None])
    if name.endswith(".webp"):  # which knows colour only
        return
    Image.fromarray(GREY).save(folder / name, **LOSSLESS[name])
    assert np.array_equal(read_folder(folder).x, GREY[None, None])


def test_fewer_bits_span_the_same_range(tmp_path: Path) -> None:
    """A k-bit sample v is v * 255 / (2^k - 1); white is 255 whichever number stands for it."""
    for bits in (1, 2, 4):
        levels = np.arange(8) % 2**bits
        packed = np.packbits((levels[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).reshape(-1)).tobytes()
        truth = levels * 255 // (2**bits - 1)
        for order in "<>":
            for photometric, expected in ((1, truth), (0, 255 - truth)):
                path = write(tmp_path / "a.tif", tiff(8, 1, packed, photometric, [bits], order))
                assert np.array_equal(np.asarray(open_picture(path).convert("L"))[0], expected)
        path = write(tmp_path / "a.png", png(bits, 0, np.frombuffer(packed, np.uint8)[None]).replace(struct.pack(">II", len(packed), 1), struct.pack(">II", 8, 1)))
        content = bytearray(path.read_bytes())
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
        assert np.array_equal(np.asarray(open_picture(write(path, bytes(content))).convert("L"))[0], truth)


@pytest.mark.parametrize("scale", [256, 257])
def test_palettes_of_8_bits_in_tiff(tmp_path: Path, scale: int) -> None:
    palette, index = RNG.integers(256, size=(3, 256)), np.arange(20, dtype=np.uint8).reshape(4, 5)
    colours = (palette * scale).reshape(-1).tolist()
    path = write(tmp_path / "a.tif", tiff(5, 4, index.tobytes(), 3, [8], t320=colours))
    assert np.array_equal(np.asarray(open_picture(path).convert("RGB")), palette.T[index])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_the_file(tmp_path: Path, orientation: int) -> None:
    turned = {
        1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1], 5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, -1), 7: COLOUR[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(COLOUR),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.tif", "b.tiff", "a.webp", "a.png"):
        Image.fromarray(COLOUR).save(tmp_path / name, **LOSSLESS.get({"b.tiff": "a.tiff"}.get(name, name), {}), exif=exif)
        assert np.array_equal(np.asarray(open_picture(tmp_path / name)), turned), name


def test_every_format_serves_as_density_folder_and_item(tmp_path: Path) -> None:
    dark = np.full((4, 4), 255, dtype=np.uint8)
    dark[:2, :2] = 0
    for i, (name, options) in enumerate(LOSSLESS.items()):
        Image.fromarray(dark).save(tmp_path / name, **options)
        x = datasets.load(tmp_path / name, sizes=(50, 5, 5)).train
        assert ((x[:, 0] < 0) & (x[:, 1] > 0)).all()  # the upper left quarter
        for part, count in (("train", 12), ("test", 3)):
            for j in range(count):
                folder = tmp_path / "split" / part / "ab"[i % 2]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(folder / f"{i} {j} {name}", **options)
    data = datasets.load(tmp_path / "split", condition="label", validation_fraction=0.1)
    assert data.event_shape == (3, 4, 4) and len(data.train) + len(data.validation) == 12 * len(LOSSLESS)
    assert len(data.test) == 3 * len(LOSSLESS) and data.classes == ("a", "b")
    assert not any("ignored (" in n for n in data.notices)
    assert len(read_items([tmp_path / "split" / "test"], (3, 4, 4), 256).x) == 3 * len(LOSSLESS)


# --- refused --------------------------------------------------------------------------------------------------------------


def deep(channels: int, kind: str = ">u2") -> np.ndarray:
    return RNG.integers(65536, size=(8, 8, channels)).astype(kind)


def strips(layers: int, count: int) -> dict[str, Any]:
    """The tags of an image in ``count`` strips of one row, all at one place, in separate planes where there are ``layers``."""
    return {"t273": [400] * count, "t278": [1], "t279": [8] * count, **({"t284": [2]} if layers > 1 else {})}


def jpeg_of_12_bits() -> bytes:
    """A JPEG file whose header says 12 bits."""
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    content[content.index(b"\xff\xc0") + 4] = 12
    return bytes(content)


DEEP = {
    "png colour": ("x.png", png(16, 2, deep(3)), r"more than 8 bits a channel \(16\)"),
    "png colour and alpha": ("x.png", png(16, 6, deep(4)), r"more than 8 bits a channel \(16\)"),
    "png grey": ("x.png", png(16, 0, deep(1)), r"more than 8 bits a channel \(16\)"),
    "png grey and alpha": ("x.png", png(16, 4, deep(2)), r"more than 8 bits a channel \(16\)"),
    "png under a jpeg's name": ("x.jpg", png(16, 2, deep(3)), r"more than 8 bits a channel \(16\)"),
    "tiff colour": ("x.tif", tiff(8, 8, deep(3, "<u2").tobytes(), 2, [16] * 3), r"more than 8 bits a channel \(16\)"),
    "tiff colour, other bytes first": ("x.tif", tiff(8, 8, deep(3).tobytes(), 2, [16] * 3, ">"), r"more than 8 bits a channel \(16\)"),
    "tiff colour and alpha": ("x.tif", tiff(8, 8, deep(4, "<u2").tobytes(), 2, [16] * 4, t338=[2]), r"more than 8 bits a channel \(16\)"),
    "tiff cmyk": ("x.tif", tiff(8, 8, deep(4, "<u2").tobytes(), 5, [16] * 4), r"more than 8 bits a channel \(16\)"),
    "tiff grey": ("x.tif", tiff(8, 8, deep(1, "<u2").tobytes(), 1, [16]), r"more than 8 bits a channel \(16\)"),
    "tiff 12 bits": ("x.tif", tiff(8, 8, bytes(96), 1, [12]), r"more than 8 bits a channel \(12\)"),
    "tiff floats": ("x.tif", tiff(8, 8, np.ones((8, 8), "<f4").tobytes(), 1, [32], t339=[3]), r"more than 8 bits a channel \(32\)"),
    "tiff palette": ("x.tif", tiff(8, 8, bytes(64), 3, [8], t320=[*range(0, 76800, 100)]), r"its palette has 16"),
    "tiff signed": ("x.tif", tiff(8, 8, bytes(64), 1, [8], t339=[2]), r"samples that are no unsigned integers"),
    "tiff fourth channel": ("x.tif", tiff(8, 8, bytes(256), 2, [8] * 4, t338=[0]), r"channels beside its colours"),
    "tiff fourth plane": ("x.tif", tiff(8, 8, bytes(256), 2, [8] * 4, t338=[0], t284=[2]), r"channels beside its colours"),
    "tiff without its last strips": ("x.tif", tiff(8, 8, bytes(600), 1, [8], **strips(1, 5)), r"leave some of the pixels out"),
    "tiff without its last plane": ("x.tif", tiff(8, 8, bytes(600), 2, [8] * 3, **strips(3, 16)), r"leave some of the pixels out"),
    "tiff of huge tiles": ("x.tif", tiff(8, 8, bytes(600), 1, [8], t322=[2**15], t323=[2**15], t324=[300], t325=[64]), r"claims more than 50,000,000"),
    "tiff of very many pixels": ("x.tif", tiff(2**20, 2**20, bytes(64), 1, [8]), r"claims more than 50,000,000|cannot be read"),
    "bmp of very many pixels": ("x.bmp", b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 54, 40, 2**15, 2**15, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(64), r"claims more than 50,000,000|cannot be read"),
    "jpeg of 12 bits": ("x.jpg", jpeg_of_12_bits(), r"a JPEG of more than 8 bits"),
    "bmp of ten bits": ("x.bmp", b"BM" + struct.pack("<IIIIiiHHIIIIIIIII", 0, 0, 66, 40, 2, 2, 1, 32, 3, 0, 0, 0, 0, 0, 0x3FF00000, 0xFFC00, 0x3FF) + bytes(16), r"cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_what_pillow_reduces_is_refused(tmp_path: Path, name: str) -> None:
    file, content, message = DEEP[name]
    path = write(tmp_path / file, content)
    for read in (lambda: open_picture(path), lambda: read_folder(tmp_path), lambda: datasets.load(path), lambda: read_items([path], (3, 8, 8), 256)):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.tif", "a.webp", "a.png"])
def test_pages_and_frames_are_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(c) for c in (COLOUR, 255 - COLOUR)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=rf"{name}.*several pages or frames; expected one image"):
        read_folder(tmp_path)


def test_a_camera_s_jpeg_with_a_preview_is_its_first_image(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), level, dtype=np.uint8)) for level in (40, 200)]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.jpg")), np.full((8, 8), 40))


@pytest.mark.parametrize("name", [*LOSSLESS, "a.jpg", "lossy.webp", "group4.tif"])
def test_a_file_cut_short_is_refused_or_whole(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(GREY) if name != "group4.tif" else Image.fromarray(GREY).convert("1")
    image.save(tmp_path / name, **LOSSLESS.get(name, {"compression": "group4"} if name == "group4.tif" else {}))
    content, truth = (tmp_path / name).read_bytes(), np.asarray(open_picture(tmp_path / name))
    for end in range(0, len(content), 3):
        write(tmp_path / name, content[:end])
        try:
            assert np.array_equal(np.asarray(open_picture(tmp_path / name)), truth), end
        except DataError:
            continue


# --- MNIST's packed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_packed_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, folder: str) -> None:
    import torchvision.datasets
    import torchvision.datasets.utils

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", no_network)
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    truth, sums = {}, []
    for part, count in (("train", 10_020), ("t10k", 7)):
        truth[part] = RNG.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, head, values in (("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), truth[part]), ("labels-idx1", struct.pack(">II", 2049, count), labels)):
            file = f"{part}-{kind}-ubyte.gz"
            content = gzip.compress(head + values.tobytes(), 1)
            (raw / file).write_bytes(content)
            sums.append((file, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(getattr(torchvision.datasets, folder), "resources", sums)
    whole = {file: (raw / file).read_bytes() for file, _ in sums}
    for bad, message in ((None, "is missing"), (b"\x1f\x8b damaged", "differs from the published file")):
        (raw / sums[2][0]).unlink() if bad is None else (raw / sums[2][0]).write_bytes(bad)
        with pytest.raises(DataError, match=rf"download=False.*{sums[2][0]} {message}"):
            datasets.load(name, root=tmp_path, download=False)
        assert sorted(p.name for p in raw.iterdir()) == sorted(f for f, _ in sums if bad is not None or f != sums[2][0])
    for file, content in whole.items():  # as links to another place, too
        (tmp_path / file).write_bytes(content)
        (raw / file).unlink()
        (raw / file).symlink_to(tmp_path / file)
    data = datasets.load(name, root=tmp_path, download=False, condition="label")
    assert np.array_equal(data.test[:, 0], truth["t10k"]) and (len(data.train), len(data.validation)) == (20, 10_000)
    order = np.random.default_rng(0).permutation(10_020)
    assert np.array_equal(data.train[:, 0], truth["train"][order[10_000:]])
    assert data.test_context is not None and data.test_context.argmax(1).tolist() == list(range(7))
    assert torch.equal(datasets.load(name, root=tmp_path, download=False).test, data.test)  # unpacked by now


def test_pillow_reads_a_stream_as_it_reads_a_file(tmp_path: Path) -> None:
    for name, options in LOSSLESS.items():
        Image.fromarray(COLOUR).save(tmp_path / name, **options)
        stream = io.BytesIO((tmp_path / name).read_bytes())
        assert np.array_equal(np.asarray(open_picture(Path("in an archive"), stream)), COLOUR), name
