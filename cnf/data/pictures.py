"""Image files: safe decoding, and grey images as densities in the plane."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cnf._utils.errors import DataError
from cnf._utils.untrusted import require_file
from cnf.data.rows import Table
from cnf.data.splits import DataSplits, Options, assemble

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "MAX_PIXELS", "SUFFIXES", "PictureDensity", "load_picture", "open_picture"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = "PNG, JPEG, WebP, BMP or TIFF"  # for messages
MAX_PIXELS = 50_000_000  # an image that claims more is rejected before decoding
MAX_SCANS = 200  # of a progressive JPEG, each a pass over all pixels; typical files have about ten
_BITS, _PHOTOMETRIC, _STRIP_OFFSETS, _PLANAR, _COLOR_MAP = 258, 262, 273, 284, 320  # TIFF tags
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 322, 323, 324, 338, 339


def open_picture(path: Path, file: IO[bytes] | None = None) -> Image.Image:
    """Decode a PNG, JPEG, WebP, BMP or TIFF image and apply its EXIF orientation.

    Pillow silently reduces deeper images to 8 bits, so the depth is read from the file's header.

    Args:
        path: the file, or its name in messages if ``file`` is given.
        file: stream to read instead of ``path``.

    Raises:
        DataError: if the file is missing, unreadable, deeper than 8 bits, has several pages or frames, or claims more
            than 50 million pixels (a decompression bomb).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if file is None:
        require_file(path, DataError, f"image {str(path)!r}")
    try:
        with path.open("rb") if file is None else nullcontext(file) as source:
            picture = _decode(source)
    except Image.DecompressionBombError:
        raise DataError(f"image {str(path)!r} claims more than {MAX_PIXELS:,} pixels and was not opened (decompression bomb?); shrink it first") from None
    except _Refused as error:
        raise DataError(f"image {str(path)!r} {error}") from None
    except UnidentifiedImageError:
        reason = "it is none of them, or damaged, or a JPEG of more than 8 bits a channel"
        raise DataError(f"image {str(path)!r} cannot be read as {FORMATS}: {reason}") from None
    except Exception as error:  # Pillow raises many exception types for damaged files
        raise DataError(f"image {str(path)!r} cannot be read as {FORMATS}: {error}") from error
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block; the pixels are intact and kept as stored
        return picture


class _Refused(Exception):
    """Intact image of an unsupported kind; the text continues the file's name."""


def _decode(file: IO[bytes]) -> Image.Image:
    from PIL import Image

    def opened() -> Any:
        file.seek(0)
        return Image.open(file, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF"))

    with warnings.catch_warnings():
        # our limit is lower than Pillow's warning; a damaged EXIF block is harmless
        warnings.simplefilter("ignore")
        picture = opened()
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a camera's JPEG with previews
            raise _Refused("has several pages or frames; expected one image: save one of them in a file of its own")
        scans_allowed = MAX_SCANS
        if picture.format == "PNG":
            _refuse_deep(_png_depth(file))
            opened().verify()  # pixel checksums, which decoding does not verify
        elif picture.format == "TIFF":
            _check_tiff(picture)
            scans_allowed *= max(1, *(len(picture.tag_v2.get(tag, ())) for tag in (_STRIP_OFFSETS, _TILE_OFFSETS)))
        if picture.info.get("progressive") or picture.info.get("compression") in ("jpeg", "tiff_jpeg"):
            file.seek(0)
            scans = file.read().count(b"\xff\xda")
            if scans > scans_allowed:
                raise ValueError(f"it has {scans:,} scans, expected at most {scans_allowed:,}")
        picture = opened()
        picture.load()
    # Pillow converts premultiplied grey (La) to LA only
    whole: Image.Image = picture.convert("LA") if picture.mode == "La" else picture
    return whole


def _refuse_deep(bits: int) -> None:
    if bits > 8:
        raise _Refused(f"has more than 8 bits a channel ({bits}); convert it to 8 bits")


def _png_depth(file: IO[bytes]) -> int:
    """Return the bits per channel, from the header (the first chunk)."""
    file.seek(0)
    start = file.read(25)
    if start[12:16] != b"IHDR":
        raise ValueError("its first chunk is not IHDR")
    return start[24]


def _check_tiff(picture: Any) -> None:
    """Reject TIFF files that Pillow silently reduces, drops or misreads, and tiles of unlimited size."""
    from PIL import Image

    tags = picture.tag_v2
    _refuse_deep(max(tags.get(_BITS, (1,))))
    # palettes have 16 bits: 257 times the 8-bit value, or 256 times in some writers
    if tags.get(_PHOTOMETRIC) == 3 and any(value % 257 and value % 256 for value in tags.get(_COLOR_MAP, ())):
        raise _Refused("has more than 8 bits a channel (its palette has 16); convert it to 8 bits")
    if set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}:
        raise _Refused("has samples that are no unsigned integers; convert it to unsigned 8 bits")
    if 0 in tags.get(_EXTRA_SAMPLES, ()):
        raise _Refused("has channels beside its colours that are not marked as transparency; remove them or mark them so")
    if tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1) > MAX_PIXELS:
        raise Image.DecompressionBombError
    layers = len(picture.getbands()) if picture.info["compression"] == "raw" and tags.get(_PLANAR) == 2 else 1
    covered = sum((x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1), *_ in picture.tile)
    if covered < layers * picture.width * picture.height:
        raise ValueError("its strips or tiles leave some of the pixels out")


class PictureDensity:
    """Density in the plane proportional to the darkness of a grey image (FFJORD's ``train_img2d``).

    A pixel's mass is proportional to (lightest value − its value), or to (its value − darkest value) with
    ``invert=True``; the lightest (darkest) grey is empty. Within a pixel the density is uniform. The longer side spans
    [-4, 4], the aspect ratio is kept, y points up, the centre is the origin. Transparent pixels are empty.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF.
        invert: make light dense instead of dark.

    Attributes:
        mass: (H, W) probabilities of the pixels, row 0 at the top.
        side: side length of a pixel in the plane.
        entropy: exact differential entropy in nats.

    Raises:
        DataError: if the image cannot be opened or has a single grey value.
    """

    def __init__(self, path: str | Path, *, invert: bool = False) -> None:
        from PIL import Image

        picture = open_picture(Path(path)).convert("RGBA")
        paper = Image.new("RGBA", picture.size, (0, 0, 0, 255) if invert else (255, 255, 255, 255))
        grey = np.asarray(Image.alpha_composite(paper, picture).convert("L"), dtype=np.float64)
        mass = grey - grey.min() if invert else grey.max() - grey
        if mass.sum() == 0.0:
            raise DataError(f"image {str(path)!r} must have dark shapes on a light ground, got one grey value everywhere ({grey.flat[0]:g})")
        self.mass: Table = mass / mass.sum()
        self.side = 8.0 / max(mass.shape)
        filled = self.mass[self.mass > 0.0]
        self.entropy = float(-(filled * np.log(filled)).sum() + 2.0 * np.log(self.side))

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """Draw ``n`` samples, float32 (n, 2)."""
        height, width = self.mass.shape
        total = np.cumsum(self.mass.reshape(-1))
        pixel = np.searchsorted(total, rng.random(n) * total[-1], side="right")
        row, column = np.divmod(pixel, width)
        x = column + rng.random(n) - 0.5 * width
        y = 0.5 * height - (row + rng.random(n))
        return np.stack([self.side * x, self.side * y], axis=1).astype(np.float32)


def load_picture(path: Path, options: Options) -> DataSplits:
    """Load samples of the density of a grey image, drawn once with ``options.seed``."""
    density = PictureDensity(path, invert=options.invert)
    parts = [density.sample(n, np.random.default_rng([options.seed, 0, i])) for i, n in enumerate(options.sizes)]
    dense = "light is dense" if options.invert else "dark is dense"
    notice = f"the density of the image {path.name} ({dense}), drawn once by seed {options.seed}"
    return assemble(str(path), "toy", parts, options, columns=("x", "y"), entropy=density.entropy, notices=[notice])
