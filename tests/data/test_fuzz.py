"""Damaged files, odd modes and odd names: each file is read or reported, and none ends a run."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastfg.data import batches, find_images, path_text
from tests.data.test_folder import to_tensor

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F")
SKIPPED = {"EPS", "PDF", "PALM", "WMF", "BUFR", "GRIB", "HDF5"}  # Pillow can't read these by itself
NAMES = [
    b"\xff\xfe not utf-8.png",
    b"new\nline.png",
    b"carriage\rreturn.png",
    b"-rf.png",
    b"<script>alert(1)</script>.png".replace(b"/", b"_"),
    b'quote",comma.png',
    b" .png",
    b"=1+1.png",
    b"\x1b[31mred.png",
    "é\u202e雪.png".encode(),
    b"[red].png",
    b":bug:.png",
    b"a" * 246 + b".png",
]


def written():
    """Small files in every format and mode that Pillow writes: (name, bytes)."""
    Image.init()
    random = np.random.default_rng(0)
    for form in sorted(set(Image.SAVE) - SKIPPED):
        for mode in MODES:
            pixels = random.integers(0, 255, (12, 20, 3), dtype=np.uint8)
            if mode in ("I;16", "I;16B"):
                image = Image.frombytes(mode, (20, 12), pixels.tobytes()[: 20 * 12 * 2])
            elif mode in ("LAB", "HSV", "PA"):
                image = Image.frombytes(
                    mode, (20, 12), pixels.tobytes()[: 20 * 12 * len(Image.new(mode, (1, 1)).getbands())]
                )
            else:
                image = Image.fromarray(pixels).convert(mode)
            file = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    image.save(file, form)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # this format does not support this mode
            yield f"{form}-{mode}.{form.lower()}", file.getvalue()


def square(image):
    return to_tensor(image.convert("RGB").resize((8, 8)))


def read_all(paths):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about truncated files
        return list(batches(paths, square, 16))


@pytest.mark.slow
def test_every_format_mode_and_truncation(tmp_path):
    files = list(written())
    assert {"PNG-I;16.png", "TIFF-F.tiff", "GIF-P.gif", "WEBP-RGBA.webp", "JPEG-CMYK.jpeg"} <= {n for n, _ in files}
    paths = []
    for name, data in files:
        for tenth in range(11):
            path = tmp_path / f"{tenth}-{name}"
            path.write_bytes(data[: len(data) * tenth // 10])
            paths.append(path)
    found = read_all(paths)
    read, errors = [p for b in found for p in b.paths], [e for b in found for e in b.errors]
    assert sorted([*read, *(error.path for error in errors)]) == sorted(paths)  # each once
    assert all(error.message for error in errors)
    assert {"10-PNG-RGBA.png", "10-TIFF-F.tiff", "10-PNG-I;16.png", "10-BMP-1.bmp"} <= {path.name for path in read}
    assert all(bool(batch.images.isfinite().all()) for batch in found)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "GIF", "WEBP", "BMP"])
def test_flipped_bytes(tmp_path, form):
    file, random = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(file, form)
    paths = []
    for n in range(60):
        data = bytearray(file.getvalue())
        for at in random.integers(0, min(len(data), 200 if n % 2 else len(data)), 3):
            data[at] = random.integers(0, 256)
        paths.append(tmp_path / f"{n}.{form.lower()}")
        paths[-1].write_bytes(data)
    found = read_all(paths)
    assert sum(len(batch.paths) + len(batch.errors) for batch in found) == len(paths)


@pytest.fixture
def odd_names(tmp_path):
    """A folder of images with odd names."""
    folder = os.fsencode(tmp_path / "odd")
    Path(os.fsdecode(folder)).mkdir()
    for n, name in enumerate(NAMES):
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118, PTH123 - pathlib takes no bytes
            Image.new("RGB", (8, 8), (n, 0, 0)).save(file, "PNG")
    return tmp_path / "odd"


def test_odd_names(odd_names):
    found = find_images([odd_names])
    assert len(found.paths) == len(NAMES) and not found.skipped
    (batch,) = batches(found.paths, to_tensor, 20)
    assert len(batch.paths) == len(NAMES) and not batch.errors
    texts = {path_text(path).encode() for path in batch.paths}  # must encode as UTF-8
    assert len(texts) == len(NAMES)
