"""CelebA: aligned faces, read from the official files under the data root."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.progress import progress
from cnf._utils.untrusted import require_file, zip_members
from cnf.data.folders import rgb
from cnf.data.pictures import open_picture
from cnf.data.prepared import Blocks, prepare, stamp
from cnf.data.rows import Array, reading
from cnf.data.splits import DataSplits, Options, assemble

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["NAMES", "celeba_picture", "load_celeba"]

NAMES = {"celeba": "CelebA, 202,599 aligned faces, resized and centre-cropped to 32x32 (image_size); root/celeba"}
ALIGNED = (178, 218)  # width and height of the aligned images
SIZE = 32
MAX_MEMBER = 2**24  # bytes of an image in the zip file; CelebA's have about ten thousand


def celeba_picture(picture: Image.Image, size: int) -> Image.Image:
    """Resize and crop an aligned image as AFFJORD's published code does (arXiv 2306.02731).

    The shorter side of the aligned image (178 x 218) is resized to ``size`` (bilinear, antialiased), and the centre is
    cropped, which keeps the whole width. Protocols that crop 148 x 148 pixels first are not comparable.
    """
    from PIL import Image

    height = size * ALIGNED[1] // ALIGNED[0]
    top = round((height - size) / 2)
    return picture.resize((size, height), Image.Resampling.BILINEAR).crop((0, top, size, top + size))


def load_celeba(name: str, options: Options) -> DataSplits:
    """Load CelebA in its official partition, decoded on first use into ``root/celeba/prepared``.

    Raises:
        DataError: for files that are missing, damaged, or not the aligned images.
        ConfigError: for an ``image_size`` above that of the aligned images.
    """
    size, folder = options.image_size or SIZE, options.folder / name
    if size > ALIGNED[0]:
        raise ConfigError(f"image_size must be at most {ALIGNED[0]}, the width of celeba's images, got {size}")
    lists = [folder / f"list_eval_partition.{suffix}" for suffix in ("txt", "csv")]
    inner = folder / "img_align_celeba"  # some archives nest this folder in a folder of the same name
    sources = [inner / inner.name, inner, folder / "img_align_celeba.zip"]
    partition, source = (next((p for p in paths if p.exists()), None) for paths in (lists, sources))
    if partition is None or source is None:
        lacking = [file for file, path in ((lists[0].name, partition), (inner.name, source)) if path is None]
        raise DataError(
            f"celeba needs img_align_celeba (a folder, or its .zip) and list_eval_partition.txt in {str(folder.resolve())!r}; "
            f"{' and '.join(lacking)} not there. data/README.md says where to get them"
        )
    names = _partition(partition)
    mark = stamp([partition, source], size)
    images, notices = [], []
    for part, wanted in zip(("train", "validation", "test"), names, strict=True):
        stem = f"{part}-{size}x{size}-{options.nbits}bit"
        blocks = _faces(source, wanted, part, size)
        part_images, said = prepare(folder / "prepared", stem, mark, blocks, (3, size, size), options.nbits)
        images.append(part_images)
        notices += [f"{part}: {notice}" for notice in said]
    notices.append(f"official partition; shorter side resized to {size}, centre cropped to {size}x{size}")
    if [len(n) for n in names] != [162_770, 19_867, 19_962]:
        notices.append("the published partition has 162,770, 19,867 and 19,962 images: figures do not compare")
    return assemble(name, "image", images, options, levels=2**options.nbits, notices=notices, flip=True)


def _partition(path: Path) -> list[list[str]]:
    """Return the file names of the three parts, from lines such as ``000001.jpg 0`` (or with a comma)."""
    names: list[list[str]] = [[], [], []]
    require_file(path, DataError)
    with reading(path, "text"):
        lines = path.read_text(encoding="utf-8").replace(",", " ").split("\n")
    for i, line in enumerate(lines, start=1):
        words = line.split()
        if not words or (i == 1 and words[-1] == "partition"):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2") or words[0] != Path(words[0]).name:
            raise DataError(f"line {i} of {str(path)!r} is {line.strip()[:60]!r}; expected a file name and 0, 1 or 2")
        names[int(words[1])].append(words[0])
    if not all(names):
        raise DataError(f"{str(path)!r} must list images of each part, got {[len(n) for n in names]}")
    return names


def _faces(source: Path, names: list[str], part: str, size: int) -> Blocks:
    def from_files(opened: Callable[[str], IO[bytes] | None]) -> Iterator[Array]:
        for name in progress(names, f"decoding celeba ({part})", len(names)):
            path = source / name
            picture = open_picture(path, opened(name))
            if picture.size != ALIGNED:
                raise DataError(
                    f"image {str(path)!r} is {picture.width}x{picture.height}; expected the aligned "
                    f"{ALIGNED[0]}x{ALIGNED[1]}. Load your own images by data={str(source)!r} with image_size={size}"
                )
            yield rgb(celeba_picture(picture.convert("RGB"), size))

    def blocks() -> Iterator[Array]:
        if source.is_dir():
            yield from from_files(lambda name: None)
            return
        # members are decoded from the archive, never unpacked to disk
        with reading(source, "a zip file"):
            size_of_zip = require_file(source, DataError)
            archive = zipfile.ZipFile(source)
        with archive:
            with reading(source, "a zip file"):
                members = {Path(m.filename).name: m for m in zip_members(archive, size_of_zip)}
            yield from from_files(lambda name: _member(archive, source, members.get(name), name))

    return blocks


def _member(archive: zipfile.ZipFile, path: Path, member: zipfile.ZipInfo | None, name: str) -> IO[bytes]:
    if member is None:
        raise DataError(f"{str(path)!r} lacks the image {name!r}")
    if member.file_size > MAX_MEMBER:
        raise DataError(f"{member.filename!r} in {str(path)!r} claims {member.file_size:,} bytes and was not read: a bomb?")
    with reading(path, "a zip file"):
        return io.BytesIO(archive.read(member))
