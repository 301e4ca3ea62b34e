"""DICOM files of one image, grey or in colour: values of the modality, mapped to 8 bits by a window.

Read with pydicom, which runs no code of a file. What decides how the pixels look is either applied or refused by name,
so that no image is shown otherwise than its file says.
"""

from __future__ import annotations

import importlib.util
from math import isfinite, nan
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fastfg.data.image import Picture, Window, check_size, to_8_bits, without_warnings

MISSING = "DICOM needs pydicom: pip install 'fastfg[dicom]'"
SUFFIXES = {".dcm", ".dicom"}
DEFLATED = b"1.2.840.10008.1.2.1.99"  # a transfer syntax whose size is not known before it is unpacked
COMPRESSED_ONLY = ("YBR_ICT", "YBR_RCT")  # undone by the decoder of JPEG 2000
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
OPTIONAL = (
    "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit", "PresentationLUTShape",
)  # fmt: skip
HEAD = 4096  # bytes that hold the transfer syntax


def why_no_dicom() -> str:
    """Why DICOM files can't be read; empty if they can."""
    return "" if importlib.util.find_spec("pydicom") is not None else MISSING


def read_dicom(file: BinaryIO, window: Window | None, max_pixels: int, max_aspect: float) -> Picture:
    """The image in an open DICOM file.

    Grey: the stored values go through the modality's rescale or table (to Hounsfield units in CT). ``window`` is in
    these units. Without it, it is the file's first window (centre and width), else from the smallest to the largest
    value. Files of 8 bits without any of these keep their values. Padding is black, and MONOCHROME1 is inverted.
    Colour: 8 bits per channel, as RGB.

    Raises ImportError without pydicom, and ValueError for what is not applied: several frames, enhanced objects,
    palettes, windows that are tables or sigmoids (unless ``window`` is given), values in the upper bits, deflated
    files.
    """
    if reason := why_no_dicom():
        raise ImportError(reason)
    with without_warnings():  # pydicom's, about values that break the standard and are not used
        return _read(file, window, max_pixels, max_aspect)


def _read(file: BinaryIO, window: Window | None, max_pixels: int, max_aspect: float) -> Picture:
    import pydicom
    from pydicom.pixels import pixel_array

    file.seek(0)
    if DEFLATED in file.read(HEAD):
        raise ValueError("expected a DICOM file that is not deflated, got one; convert its transfer syntax")
    file.seek(0)
    _check(_tidy(pydicom.dcmread(file, stop_before_pixels=True)), max_pixels, max_aspect)
    file.seek(0)
    data = _tidy(pydicom.dcmread(file))
    if "PixelData" not in data:
        raise ValueError("expected pixels, got a DICOM object without PixelData")
    stored = pixel_array(data)
    if stored.shape[:2] != (data.Rows, data.Columns):
        raise ValueError(f"expected {data.Rows} x {data.Columns} pixels in one frame, got {list(stored.shape)}")
    if data.SamplesPerPixel == 1:
        return _grey(data, stored, window)
    return Picture(Image.fromarray(np.ascontiguousarray(stored), "RGB"), None)


def _tidy(data: Any) -> Any:
    """``data`` without the elements of ``OPTIONAL`` that are empty, and with both parts of a rescale or none."""
    for name in OPTIONAL:
        if name in data and data[name].is_empty:
            del data[name]
    if "RescaleSlope" in data or "RescaleIntercept" in data:
        data.RescaleSlope, data.RescaleIntercept = data.get("RescaleSlope", "1"), data.get("RescaleIntercept", "0")
    return data


def _check(data: Any, max_pixels: int, max_aspect: float) -> None:
    """Refuse what is not read, by the header alone."""
    if "Rows" not in data or "Columns" not in data:
        raise ValueError("expected an image, got a DICOM object without Rows and Columns")
    check_size((int(data.Columns), int(data.Rows)), max_pixels, max_aspect)
    if int(data.get("NumberOfFrames") or 1) != 1:
        raise ValueError(f"expected one frame, got {data.NumberOfFrames}; save each as a file of its own")
    if "SharedFunctionalGroupsSequence" in data:
        raise ValueError("expected a classic DICOM image, got an enhanced one, whose window is elsewhere; convert it")
    kind, samples = str(data.get("PhotometricInterpretation", "")), int(data.get("SamplesPerPixel") or 1)
    if (kind, samples) not in [*((name, 1) for name in GREY), *((name, 3) for name in COLOURS)]:
        raise ValueError(f"expected one of {(*GREY, *COLOURS)}, got {kind or None} with {samples} samples per pixel")
    if kind in COMPRESSED_ONLY and not data.file_meta.TransferSyntaxUID.is_compressed:
        raise ValueError(f"expected {kind} in JPEG 2000, got it uncompressed")
    if int(data.HighBit) != int(data.BitsStored) - 1:
        raise ValueError(
            f"expected values in the lower bits (HighBit {int(data.BitsStored) - 1}), got HighBit {data.HighBit}"
        )
    if kind == "MONOCHROME2" and data.get("PresentationLUTShape") == "INVERSE":
        raise ValueError("expected MONOCHROME2 that is not inverted, got PresentationLUTShape INVERSE")
    if samples == 3 and int(data.BitsAllocated) != 8:
        raise ValueError(f"expected 8 bits per channel in {kind}, got {data.BitsAllocated}; convert the file first")


def _grey(data: Any, stored: np.ndarray[Any, Any], window: Window | None) -> Picture:
    from pydicom.pixels import apply_modality_lut

    values = apply_modality_lut(stored, data)
    if not np.isfinite(values).all():
        raise ValueError("expected finite values, got NaN or infinity")
    inverted, padding = data.PhotometricInterpretation == "MONOCHROME1", _padding(data, stored)
    own = _own_window(data) if window is None else window
    eight = int(data.BitsStored) == 8 and int(data.get("PixelRepresentation", 0)) == 0
    plain = own is None and eight and np.array_equal(values, stored)
    if own is None:
        inside = values if padding is None or padding.all() else values[~padding]
        own = (0.0, 255.0) if plain else (float(inside.min()), float(inside.max()))
    mapped = to_8_bits(values, *own, inverted)
    if padding is not None:
        mapped[padding] = 0
    return Picture(Image.fromarray(mapped), None if plain else own)


def _padding(data: Any, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Which pixels are no part of the image, by their stored values."""
    if "PixelPaddingValue" not in data:
        return None
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    bits = [int(data[name].value) & (2 ** int(data.BitsAllocated) - 1) for name in names if name in data]
    unsigned = np.array(bits, dtype=f"u{stored.dtype.itemsize}")  # files give them with either sign
    low, high = unsigned.view(stored.dtype).min(), unsigned.view(stored.dtype).max()
    return (stored >= low) & (stored <= high)


def _own_window(data: Any) -> Window | None:
    """The first window of a file, by its centre and width (DICOM PS3.3, C.11.2.1.2); None: it has none."""
    if "WindowCenter" not in data or "WindowWidth" not in data:
        if "VOILUTSequence" in data:
            raise ValueError("window: expected LOW HIGH for a file whose own one is a table, got none")
        return None
    centre, width = (_first(data[name].value) for name in ("WindowCenter", "WindowWidth"))
    function = str(data.get("VOILUTFunction", "LINEAR"))
    if not (isfinite(centre) and isfinite(width)):
        function = f"of {centre:g}, {function}"
    if function == "LINEAR" and width > 1:
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if function == "LINEAR_EXACT" and width > 0:
        return centre - width / 2, centre + width / 2
    raise ValueError(f"window: expected LOW HIGH for a file whose own one is {function} with width {width:g}, got none")


def _first(value: Any) -> float:
    first = value[0] if hasattr(value, "__getitem__") else value
    return float(first) if str(first).strip() else nan
