"""Random generators that depend on the seed and the image's key, never on the image's position in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def image_keys(images: Tensor, keys: Sequence[Any] | None) -> list[str]:
    """One key per image as text: the given ``keys``, where a number is the same as a tensor, or :func:`image_key`.

    Raises ValueError if their number is not that of the images.
    """
    if keys is None:
        return [image_key(image) for image in images]
    if len(keys) != len(images):
        raise ValueError(f"keys: expected {len(images)} of them, one per image, got {len(keys)}")
    return [str(key.item() if isinstance(key, Tensor) else key) for key in keys]


def image_key(image: Tensor) -> str:
    """A hash of the image's values: the key of an image that was given without one."""
    data = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{list(image.shape)}{image.dtype}".encode() + data.tobytes()).hexdigest()


def generator(seed: int, key: str, purpose: str) -> torch.Generator:
    """A CPU generator for one ``purpose`` on the image with this ``key``."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
