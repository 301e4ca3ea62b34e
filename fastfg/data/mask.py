"""Read the mask of an image file, in the geometry that the model's transform gives to the image."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastfg.data.image import MAX_ASPECT, MAX_PIXELS, check_frames, check_limits, check_size, opened

RANDOM = re.compile("Rand|Jitter|AugMix|AutoAugment|TrivialAugment|Elastic")  # in names of random transforms
LINEAR = 3 / 255  # three steps of 8 bits: a transform's resize and rounding may add this much


def read_mask(
    path: str | Path,
    transform: Callable[[Image.Image], Tensor],
    size: tuple[int, int],
    *,
    label: int | Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_aspect: float = MAX_ASPECT,
) -> Tensor:
    """The mask in a file as [H, W], float32 in [0, 1], aligned with the image that ``transform`` makes.

    The mask goes through ``transform`` itself, drawn in white on black, so every resize, crop and padding is that of
    the image. Colours are undone by the transforms of a black and of a white picture. At the border of the object, the
    resize mixes pixels inside and outside: values between 0 and 1 are the part inside. ``mask > 0.5`` is a hard mask.
    Padding is outside.

    Which pixels are inside: by default those with a value above 0 (0 and 1, 0 and 255, or labels with background 0).
    With ``label``, those with one of these values. In a PNG with a palette, the value is the index, not the colour.
    Colour files are refused unless all channels are equal, and so are files with transparency and JPEG, whose
    compression adds values beside the object. The EXIF orientation is applied, as in :func:`read_image`.

    Args:
        path: a file with one value per pixel. transform: the image's: a PIL image -> [C, H, W].
        size: (width, height) of the image, as :func:`read_image` gives it. The mask must have the same.
        label: the value of the object, or several.
        max_pixels, max_aspect: see :func:`read_image`.

    Raises ValueError for a file that these rules refuse, for another size than the image's, for a transform that draws
    random numbers (a random crop or flip), which would not give the mask the geometry of the image, and for one that
    does not map brightness linearly (a posterise, a histogram equalisation), through which a mask can't be followed.

    >>> import tempfile, torch, numpy as np
    >>> from PIL import Image
    >>> from fastfg.data import read_mask
    >>> values = np.zeros((4, 6), dtype=np.uint8)
    >>> values[:2, :3] = 7
    >>> def transform(image):  # keeps the left 4 columns
    ...     pixels = np.asarray(image.crop((0, 0, 4, 4)).convert("L"), dtype=np.float32)
    ...     return torch.from_numpy(pixels / 255 - 0.5)[None]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.fromarray(values).save(f"{folder}/mask.png")
    ...     read_mask(f"{folder}/mask.png", transform, size=(6, 4), label=7)
    tensor([[1., 1., 1., 0.],
            [1., 1., 1., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]])
    """
    check_limits(None, max_pixels, max_aspect)
    values = _values(Path(path), max_pixels, max_aspect)
    if (values.shape[1], values.shape[0]) != tuple(size):
        raise ValueError(
            f"mask: expected {size[0]} x {size[1]} pixels, as the image has, got {values.shape[1]} x {values.shape[0]}"
        )
    inside = values > 0 if label is None else np.isin(values, label)
    drawn = np.where(inside, 255, 0).astype(np.uint8)
    mask = _transformed(transform, Image.fromarray(drawn).convert("RGB")).double()
    black, grey, white = (
        transform(Image.fromarray(pixels).convert("RGB")).double()
        for pixels in (np.zeros_like(drawn), np.full_like(drawn, 128), np.full_like(drawn, 255))
    )
    span = white - black
    covered = span != 0  # elsewhere the transform has padded
    scale = torch.where(covered, span, 1.0)
    middle = torch.where(covered, (grey - black) / scale, 128 / 255)
    if not bool(((middle - 128 / 255).abs() <= LINEAR).all()):
        raise ValueError(
            "transform: expected one that maps brightness linearly, as a mask goes through it, got another"
        )
    return torch.where(covered, (mask - black) / scale, 0.0).mean(0).clamp(0, 1).float()


def _transformed(transform: Callable[[Image.Image], Tensor], drawn: Image.Image) -> Tensor:
    """``transform(drawn)``. Raises ValueError for a transform that draws random numbers."""
    first = transform(drawn.copy())
    for _ in range(3):  # another thread may draw random numbers at the same time
        before = _random_states()
        again = transform(drawn.copy())
        same = first.shape == again.shape and torch.equal(first, again)
        if same and _random_states() == before:
            return first
        if not same:
            break
    names = ", ".join(_random_parts(transform)) or "one that draws random numbers"
    raise ValueError(
        "transform: expected one without random parts, as the mask must get the geometry of the image, got " + names
    )


def _random_states() -> tuple[Any, ...]:
    """The states of the generators that transforms draw from."""
    state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = state
    return random.getstate(), name, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def _random_parts(transform: Any) -> list[str]:
    """Names such as ``RandomResizedCrop`` of the classes in ``transform``: its parts, and what its functions hold."""
    names: list[str] = []
    left: list[Any] = [transform]
    seen: set[int] = set()
    while left:
        part = left.pop(0)
        if id(part) in seen or isinstance(part, type) or not (callable(part) or isinstance(part, (list, tuple, dict))):
            continue
        seen.add(id(part))
        if RANDOM.search(type(part).__name__):
            names.append(type(part).__name__)
        if isinstance(part, (list, tuple, dict)):
            left += part.values() if isinstance(part, dict) else part
        else:
            left += getattr(part, "__dict__", {}).values()
            left += [cell.cell_contents for cell in getattr(part, "__closure__", None) or ()]
    return list(dict.fromkeys(names))


def _values(path: Path, max_pixels: int, max_aspect: float) -> np.ndarray:
    """The value of each pixel, [H, W], upright."""
    with path.open("rb") as file, opened(path, file) as image:
        check_size(image.size, max_pixels, max_aspect)
        check_frames(image)
        if image.format in ("JPEG", "MPO"):
            raise ValueError("mask: expected a file without loss (PNG, TIFF, BMP), got JPEG")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        transparent = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa")
        if transparent and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError("mask: expected no transparency, got transparent pixels")
        return _one_channel(image)


def _one_channel(image: Any) -> np.ndarray:
    values = np.asarray(image)
    if values.ndim == 2:
        return values
    colours = values[..., : 1 if image.mode in ("LA", "PA", "La") else 3]
    if image.mode not in ("LA", "PA", "La", "RGB", "RGBA", "RGBa") or bool((colours != colours[..., :1]).any()):
        raise ValueError(f"mask: expected one value per pixel, got colours ({image.mode}); save the labels as grey")
    return np.ascontiguousarray(colours[..., 0])
