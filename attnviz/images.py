"""Picture files in, pixels out: one reader for every mode a camera or an editor writes."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .files import first_line

__all__ = ["network_size", "read_image", "to_pixels"]

MIN_SIDE = 16
MAX_PIXELS = 100_000_000
_OPENING = Lock()
_DAMAGED = (  # what Pillow raises on damaged files
    OSError, SyntaxError, EOFError, ValueError, TypeError, LookupError, ArithmeticError,
    AttributeError, MemoryError, RuntimeError, struct.error,
)  # fmt: skip


def read_image(path: str | Path) -> Image.Image:
    """Reads a picture as 8-bit RGB, upright.

    Grey, palette, CMYK, 16-bit and float pictures are converted; transparent ones are laid on
    white; the EXIF orientation is applied.

    Args:
        path: A file in any format Pillow reads.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a whole picture between 16 x 16 and 100 million pixels.
    """
    path = Path(path)
    if not path.is_file():
        reason = "no file" if path.exists() else "not there"
        raise FileNotFoundError(f"expected a picture file, got {str(path)!r}, which is {reason}")
    with opened(path) as image:
        _check_size(image.size, str(path))
        with damage_named(path):
            return _to_rgb(ImageOps.exif_transpose(image))


def opened(path: Path, what: str = "picture") -> Image.Image:
    """Opens a picture file, of which only the header is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture, its header is damaged, or it has too many pixels.
    """
    with _OPENING, damage_named(path, what):
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own check says more
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(_too_large(image.size, str(path)))
    return image


@contextmanager
def damage_named(path: Path, what: str = "picture") -> Iterator[None]:
    """Says in one line that a file is damaged, for which Pillow has many words."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"expected a {what}, got {str(path)!r}, which no picture format matches; "
            "is it damaged or named wrongly?"
        ) from error
    except _DAMAGED as error:
        raise ValueError(
            f"expected a whole {what}, got {str(path)!r}, which is damaged "
            f"({first_line(error)}); copy or save it again"
        ) from error


def to_pixels(image: Image.Image | np.ndarray | str | Path) -> np.ndarray:
    """Returns a picture as uint8 pixels ``(h, w, 3)``.

    Args:
        image: A Pillow image, a file's path, or an array ``(h, w)``, ``(h, w, 3)`` or
            ``(h, w, 4)`` of uint8 (0 to 255) or float (0 to 1).

    Raises:
        TypeError: It is something else.
        ValueError: Wrong shape or size, or float values outside [0, 1].
    """
    if isinstance(image, str | Path):
        return np.asarray(read_image(image))
    if isinstance(image, Image.Image):
        _check_size(image.size, "a Pillow image")
        return np.asarray(_to_rgb(image))
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"expected a picture (Pillow image, uint8 array or path), got {type(image).__name__}"
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"expected a picture (h, w, 3), got an array {image.shape}")
    _check_size((image.shape[1], image.shape[0]), "an array")
    if np.issubdtype(image.dtype, np.floating):
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError("expected float pixels in [0, 1], got values outside; divide by 255?")
        image = np.round(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"expected pixels of uint8 or float, got {image.dtype}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return np.asarray(_to_rgb(Image.fromarray(image)))


def network_size(size: tuple[int, int], target: int | tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) at which a network sees a picture of `size`, uncropped.

    The long side is rounded to a multiple of 32, which networks that resize and add need.

    Args:
        size: Height and width of the picture.
        target: Length of the short side, the ratio nearly kept (a side longer than four times
            the other is squeezed), or the exact height and width.
    """
    if isinstance(target, tuple):
        return target
    height, width = size
    ratio = min(max(height, width) / min(height, width), 4)
    long = max(target, 32 * round(target * ratio / 32))
    return (target, long) if height <= width else (long, target)


def _check_size(size: tuple[int, int], what: str) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise ValueError(
            f"expected a picture of at least {MIN_SIDE} x {MIN_SIDE} pixels, "
            f"got {width} x {height} ({what})"
        )
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(size, what))


def _too_large(size: tuple[int, int], what: str) -> str:
    return (
        f"expected a picture of at most {MAX_PIXELS / 1e6:.0f} million pixels, "
        f"got {size[0]} x {size[1]} ({what}); make it smaller"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float grey
        with np.errstate(invalid="ignore"):
            values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535 if image.mode != "F" else max(1.0, float(values.max()))
        return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
