"""Random generators that depend on the seed and the image's key, never on the image's position in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor


def image_keys(images: Tensor, keys: Sequence[Any] | None) -> list[str]:
    """One key per image as text: the given ``keys``, where a number is the same as a tensor, or :func:`image_key`.

    Raises TypeError unless they are texts, paths or integers in order, and ValueError if their number is not that of
    the images.
    """
    if keys is None:
        return [image_key(image) for image in images]
    if isinstance(keys, (bytes, Set)) or not hasattr(keys, "__len__"):
        raise TypeError(f"keys: expected a sequence of str or int, one per image, got {type(keys).__name__}")
    if len(keys) != len(images):
        raise ValueError(f"keys: expected {len(images)} of them, one per image, got {len(keys)}")
    given = [key.item() if isinstance(key, Tensor) and not key.ndim else key for key in keys]
    for key in given:
        if isinstance(key, bool) or not isinstance(key, (str, Integral, PathLike)):
            raise TypeError(f"keys: expected str or int, one per image, got {key!r}")
    return [str(key) for key in given]


def image_key(image: Tensor) -> str:
    """A hash of the image's values: the key of an image that was given without one."""
    data = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{list(image.shape)}{image.dtype}".encode() + data.tobytes()).hexdigest()


def generator(seed: int, key: str, purpose: str) -> torch.Generator:
    """A CPU generator for one ``purpose`` on the image with this ``key``."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
