"""Tell models apart by the weights that a block's output depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from fastfg.models.adapter import Adapter


def fingerprints(adapter: Adapter, layers: Collection[int]) -> dict[int, str]:
    """{block: a hash of all weights of the blocks up to and including it}. A new head does not change it."""
    digest, found = hashlib.sha256(), {}
    for number, block in enumerate(adapter.blocks[: max(layers) + 1]):
        _add(digest, block, f"{number} ")
        if number in layers:
            found[number] = digest.hexdigest()
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of all weights and buffers of ``module``."""
    digest = hashlib.sha256()
    _add(digest, module, "")
    return digest.hexdigest()


def _add(digest: hashlib._Hash, module: nn.Module, prefix: str) -> None:
    for name, tensor in module.state_dict().items():
        digest.update(f"{prefix}{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
