"""Read an image file as 8 bits per channel, by documented rules and with limits on its size."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
BACKGROUND = (255, 255, 255)  # white, behind transparent pixels
MAX_PIXELS = 150_000_000
MAX_ASPECT = 50.0

MANY_FRAMES_READ = ("MPO",)  # a JPEG photograph with previews or a depth map behind it: the photograph is read
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
MIN_IS_WHITE, UNSIGNED = 0, (1,)  # values of the last two
ROWS = 1024  # rows that are windowed at a time

Window = tuple[float, float]
_filtering = threading.Lock()


class Picture(NamedTuple):
    """An image with 8 bits per channel, and the window (low, high) that it was mapped from (None for 8-bit files)."""

    image: Image.Image
    window: Window | None


def read_image(
    path: str | Path, *, window: Window | None = None, max_pixels: int = MAX_PIXELS, max_aspect: float = MAX_ASPECT
) -> Picture:
    """Read an image file with Pillow. The format is detected from the content, not from the name.

    - 8 bits per channel or fewer: the pixels are returned unchanged, in Pillow's mode. Colour profiles are ignored.
    - Grey with more bits (16-bit, 32-bit, float): values are mapped linearly from ``window`` to 0..255, clipped and
      rounded. Without a window, the file's own range is used: its smallest value becomes 0 and its largest 255,
      regardless of the declared bit depth. A constant image becomes black. A TIFF in which 0 means white is inverted.
      Values of a PGM are first scaled to 0..65535 by its declared maximum, which is how Pillow reads them.
    - Colour with 16 bits per channel in PNG and TIFF is refused, because Pillow would keep the upper 8 bits only.
      AVIF, JPEG 2000 and PPM are scaled to 8 bits by the depth that they declare.
    - Transparent pixels are composited over white. In grey with more than 8 bits, they count for the file's own range.
    - The EXIF orientation is applied if the EXIF data can be read.
    - A file with several frames or pages is refused, because only one of them would be read. The exception is a JPEG
      with embedded previews (MPO): its photograph is read.
    - DICOM: see :func:`fastfg.data.dicom.read_dicom`.

    Args:
        path: a regular file, in one of the formats :data:`FORMATS`.
        window: (low, high) for images with more than 8 bits; other images ignore it.
        max_pixels: the most pixels (width x height) that are decoded. Pillow's own limit, twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, also applies.
        max_aspect: the largest ratio of the longer side to the shorter one. Transforms that resize the shorter side
            to the model's input make the longer one longer by this ratio.

    Raises ValueError for a file that these rules refuse, and Pillow's own errors for a damaged file. Sizes are checked
    before pixels are decoded.
    """
    with Path(path).open("rb") as file:
        return read_open_image(file, Path(path), window=window, max_pixels=max_pixels, max_aspect=max_aspect)


def read_open_image(
    file: BinaryIO, path: Path, *, window: Window | None, max_pixels: int = MAX_PIXELS, max_aspect: float = MAX_ASPECT
) -> Picture:
    """:func:`read_image` for a file that is open, or bytes in memory. ``path`` is its name for messages."""
    check_limits(window, max_pixels, max_aspect)
    if begins_as_dicom(file):
        from fastfg.data.dicom import read_dicom

        return read_dicom(file, window, max_pixels, max_aspect)
    file.seek(0)
    with opened(path, file) as image:
        check_size(image.size, max_pixels, max_aspect)
        check_frames(image)
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        if not deep:
            _check_depth(image)
        inverted = deep and _tiff_tag(image, PHOTOMETRIC) == MIN_IS_WHITE
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if deep:
            return _windowed(image, window, inverted)
        return Picture(_opaque(image), None)


def opened(path: Path, file: BinaryIO) -> Image.Image:
    """The image in ``file``, not decoded yet.

    Pillow gets the open file. If it got the path, it would map an uncompressed TIFF into memory with the size that the
    image has after its EXIF rotation, and the pixels would be scrambled.
    """
    with without_warnings(Image.DecompressionBombWarning):  # max_pixels is the limit
        try:
            return Image.open(file, formats=readable_formats())
        except UnidentifiedImageError:
            raise UnidentifiedImageError(f"cannot identify image file {str(path)!r}") from None


@contextmanager
def without_warnings(kind: type[Warning] = Warning) -> Iterator[None]:
    """Context without warnings of one ``kind``. One thread at a time, as Python's filters are those of the process."""
    with _filtering, warnings.catch_warnings():
        warnings.simplefilter("ignore", kind)
        yield


def check_limits(window: Window | None, max_pixels: int, max_aspect: float) -> None:
    """Raise ValueError for arguments of :func:`read_image` that are out of range."""
    if window is not None and not (len(window) == 2 and all(map(isfinite, window)) and window[0] < window[1]):
        raise ValueError(f"window: expected LOW HIGH, finite, with LOW < HIGH, got {' '.join(map(str, window))}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels: expected at least 1, got {max_pixels}")
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect: expected at least 1, got {max_aspect}")


def readable_formats() -> list[str]:
    """The formats in :data:`FORMATS` that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def readable_suffixes() -> set[str]:
    """The file suffixes of :func:`readable_formats` and of DICOM, in lower case and with the dot."""
    from fastfg.data.dicom import SUFFIXES, why_no_dicom

    formats = {*readable_formats(), *MANY_FRAMES_READ}
    found = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return found if why_no_dicom() else found | SUFFIXES


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do: 128 bytes of any kind, then ``DICM``."""
    with path.open("rb") as file:
        return begins_as_dicom(file)


def begins_as_dicom(file: BinaryIO) -> bool:
    """:func:`is_dicom` for a file that is open at its start."""
    return file.read(132)[128:] == b"DICM"


def check_size(size: tuple[int, int], max_pixels: int, max_aspect: float) -> None:
    """Raise ValueError for a (width, height) beyond the limits of :func:`read_image`."""
    width, height = size
    if min(size) < 1:
        raise ValueError(f"expected at least 1 x 1 pixel, got {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(f"expected at most {max_pixels:,} pixels (max_pixels), got {width} x {height}")
    if max(size) > max_aspect * min(size):
        raise ValueError(f"expected sides of at most {max_aspect:g} to 1 (max_aspect), got {width} x {height} pixels")


def check_frames(image: Image.Image) -> None:
    """Raise ValueError for a file with several frames or pages."""
    if getattr(image, "is_animated", False) and image.format not in MANY_FRAMES_READ:
        raise ValueError("expected one frame or page, got several; save each as a file of its own")


def _check_depth(image: Any) -> None:
    """Refuse 16 bits per channel where Pillow silently keeps only the upper 8: in colour, and in grey with alpha."""
    bits = _tiff_tag(image, BITS_PER_SAMPLE) or ()
    rawmodes = [tile[3] for tile in image.tile if isinstance(tile[3], str)]
    if any(n > 8 for n in bits) or any(re.search(";16[BLN]", name) for name in rawmodes):
        raise ValueError(f"expected 8 bits per channel in {image.mode}, got 16; convert the file first")


def _tiff_tag(image: Any, tag: int) -> Any:
    return image.tag_v2.get(tag) if image.format == "TIFF" else None


def _windowed(image: Image.Image, window: Window | None, inverted: bool) -> Picture:
    """A grey image with more than 8 bits, mapped from its window to 0..255. Transparent pixels are white."""
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("expected finite pixels, got NaN or infinity")
    unsigned = _tiff_tag(image, BITS_PER_SAMPLE) == (32,) and _tiff_tag(image, SAMPLE_FORMAT) in (None, UNSIGNED)
    if unsigned and values.min() < 0:  # Pillow reads them as signed
        raise ValueError(f"expected 32-bit values of at most {2**31 - 1}, got larger ones")
    low, high = window or (float(values.min()), float(values.max()))
    mapped = to_8_bits(values, low, high, inverted)
    transparent = image.info.get("transparency")  # of PNG: one grey value
    if transparent is not None:
        mapped[values == transparent] = BACKGROUND[0]
    return Picture(Image.fromarray(mapped), (low, high))


def to_8_bits(values: np.ndarray[Any, Any], low: float, high: float, inverted: bool = False) -> np.ndarray[Any, Any]:
    """``values`` [H, W] mapped from ``low`` and ``high`` to 0 and 255, or to 255 and 0; all 0 without a range."""
    mapped = np.zeros(values.shape, np.uint8)
    if high > low:
        for start in range(0, len(values), ROWS):
            part = (values[start : start + ROWS].astype(np.float64) - low) * (255 / (high - low))
            mapped[start : start + ROWS] = part.round().clip(0, 255)
        if inverted:
            mapped = 255 - mapped
    return mapped


def _opaque(image: Image.Image) -> Image.Image:
    """The image itself; if it has transparent pixels, an RGB image composited over :data:`BACKGROUND`."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image
    straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    if straight.getchannel("A").getextrema() == (255, 255):
        return image
    background = Image.new("RGBA", straight.size, (*BACKGROUND, 255))
    return Image.alpha_composite(background, straight).convert("RGB")
