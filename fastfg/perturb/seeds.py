"""Random generators that depend on the seed and the image's key, never on the image's position in a batch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def image_key(image: Tensor) -> str:
    """A hash of the image's values: the key of an image that was given without one."""
    data = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{list(image.shape)}{image.dtype}".encode() + data.tobytes()).hexdigest()


def generator(seed: int, key: str, purpose: str) -> torch.Generator:
    """A CPU generator for one ``purpose`` on the image with this ``key``."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
