"""Pictures: opening them safely, and a grey picture as a density in the plane."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cnf.datasets.splits import DataSplits, Options, assemble
from cnf.errors import DataError
from cnf.strangers import require_file

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_PIXELS", "SUFFIXES", "PictureDensity", "load_picture", "open_picture"]

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 50_000_000  # a picture that claims more is refused before it is unpacked
MAX_SCANS = 200  # of a progressive JPEG, each of which is a way through all pixels; usual ones have about ten
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def open_picture(path: Path, file: IO[bytes] | None = None) -> Image.Image:
    """A PNG or JPEG picture, decoded, turned the way up that its EXIF orientation says.

    Args:
        path: the file, or what messages call it.
        file: read from here instead.

    Raises:
        DataError: if the file is missing, unreadable, not 8-bit, or claims more than 50 million pixels (a bomb).
    """
    from PIL import Image, ImageOps

    if file is None:
        require_file(path, DataError, f"picture {str(path)!r}")
    try:
        if file is None:
            with path.open("rb") as own:
                picture = _decode(own)
        else:
            picture = _decode(file)
    except Image.DecompressionBombError:
        raise DataError(
            f"picture {str(path)!r} claims more than {MAX_PIXELS:,} pixels and was not opened (decompression bomb?); "
            "shrink it first"
        ) from None
    except Exception as error:  # Pillow raises many kinds for what is damaged; all mean the same here
        raise DataError(f"picture {str(path)!r} cannot be read as PNG or JPEG: {error}") from error
    if picture.mode in _DEEP_MODES:
        raise DataError(f"picture {str(path)!r} has more than 8 bits a channel ({picture.mode}); convert it to 8 bits")
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block raises many kinds; the pixels are whole, so they are taken as they lie
        return picture


def _decode(file: IO[bytes]) -> Image.Image:
    from PIL import Image

    def opened() -> Image.Image:
        file.seek(0)
        return Image.open(file, formats=("PNG", "JPEG"))

    with warnings.catch_warnings():
        # our own limit is lower than the one that Pillow warns at; a damaged EXIF block is no matter
        warnings.simplefilter("ignore")
        picture = opened()
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if picture.format == "PNG":
            picture.verify()  # the checksums of the pixels, which decoding leaves unread
            picture = opened()
        elif picture.info.get("progressive"):
            file.seek(0)
            scans = file.read().count(b"\xff\xda")
            if scans > MAX_SCANS:
                raise ValueError(f"it has {scans:,} scans, expected at most {MAX_SCANS}")
            file.seek(0)
            picture = opened()
        picture.load()
    return picture


class PictureDensity:
    """The density of a grey picture: points fall in proportion to darkness (FFJORD's ``train_img2d``).

    A pixel's mass is proportional to (lightest value − its value), so that the lightest grey is empty; with
    ``invert=True`` to (its value − darkest value). Within a pixel the density is uniform. The longer side spans
    [-4, 4], the aspect ratio is kept, y points up, the centre is the origin. Transparent pixels are empty.

    Args:
        path: PNG or JPEG.
        invert: light is dense instead of dark.

    Attributes:
        mass: (H, W) probabilities of the pixels, row 0 at the top.
        side: length of a pixel's side in the plane.
        entropy: exact differential entropy in nats.

    Raises:
        DataError: if the picture cannot be opened or has one grey value only.
    """

    def __init__(self, path: str | Path, *, invert: bool = False) -> None:
        from PIL import Image

        picture = open_picture(Path(path)).convert("RGBA")
        paper = Image.new("RGBA", picture.size, (0, 0, 0, 255) if invert else (255, 255, 255, 255))
        grey = np.asarray(Image.alpha_composite(paper, picture).convert("L"), dtype=np.float64)
        mass = grey - grey.min() if invert else grey.max() - grey
        if mass.sum() == 0.0:
            raise DataError(
                f"picture {str(path)!r} has one grey value everywhere ({grey.flat[0]:g}); expected dark shapes "
                "on a light ground"
            )
        self.mass: NDArray[np.float64] = mass / mass.sum()
        self.side = 8.0 / max(mass.shape)
        filled = self.mass[self.mass > 0.0]
        self.entropy = float(-(filled * np.log(filled)).sum() + 2.0 * np.log(self.side))

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """Draw ``n`` points, float32 (n, 2)."""
        height, width = self.mass.shape
        total = np.cumsum(self.mass.reshape(-1))
        pixel = np.searchsorted(total, rng.random(n) * total[-1], side="right")
        row, column = np.divmod(pixel, width)
        x = column + rng.random(n) - 0.5 * width
        y = 0.5 * height - (row + rng.random(n))
        return np.stack([self.side * x, self.side * y], axis=1).astype(np.float32)


def load_picture(path: Path, options: Options) -> DataSplits:
    """The density of a grey picture as a data set, drawn once by ``options.seed``."""
    density = PictureDensity(path, invert=options.invert)
    parts = [density.sample(n, np.random.default_rng([options.seed, 0, i])) for i, n in enumerate(options.sizes)]
    dense = "light is dense" if options.invert else "dark is dense"
    notice = f"the density of the picture {path.name} ({dense}), drawn once by seed {options.seed}"
    return assemble(str(path), "toy", parts, options, columns=("x", "y"), entropy=density.entropy, notices=[notice])
