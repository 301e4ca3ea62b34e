"""Tell models apart by the weights that a block's output depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.models.adapter import Adapter
from fastfg.models.hold import hold
from fastfg.models.hooks import in_this_thread
from fastfg.torch_internals import tensors_used

SQUARES = [(side, side) for side in (224, *range(8, 1025))]  # tried as the size of the image that shows what is used
LONGEST = 64  # patches per side of other images


def fingerprints(adapter: Adapter, layers: Collection[int]) -> dict[int, str]:
    """{block: a hash of all weights that its output depends on: of the blocks up to it, and of what is before them}.

    A new head does not change it.
    """
    digest, found = hashlib.sha256(), {}
    for tensor in _before_blocks(adapter):
        _add(digest, "before", tensor)  # without its name, which changes where a model is a part of another one
    for number, block in enumerate(adapter.blocks[: max(layers) + 1]):
        _add_all(digest, block, f"{number} ")
        if number in layers:
            found[number] = digest.hexdigest()
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of all weights and buffers of ``module``."""
    digest = hashlib.sha256()
    _add_all(digest, module, "")
    return digest.hexdigest()


def _before_blocks(adapter: Adapter) -> list[Tensor]:
    """The weights outside the blocks that are used until the first block has run, such as the patch embedding.

    If no image is found that the model takes: all weights outside the blocks.
    """
    inside = {id(tensor) for block in adapter.blocks for tensor in _tensors(block)}
    outside = [tensor for tensor in _tensors(adapter.model) if id(tensor) not in inside]
    size = next(filter(partial(_takes, adapter), chain(SQUARES, _oblongs(adapter))), None)
    if size is None:
        return outside
    with hold(adapter.model, adapter.flags), torch.no_grad(), tensors_used() as used:
        _run_first_block(adapter, size)
    return [tensor for tensor in outside if id(tensor) in used]


def _oblongs(adapter: Adapter) -> Iterator[tuple[int, int]]:
    ph, pw = adapter.patch_size or (1, 1)
    return ((gh * ph, gw * pw) for gh, gw in product(range(1, LONGEST + 1), repeat=2))


def _takes(adapter: Adapter, size: tuple[int, int]) -> bool:
    try:
        adapter.grid(size)
    except ValueError:
        return False
    return True


class _Stop(Exception):  # noqa: N818  not an error
    """Ends a forward pass after the first block."""


def _run_first_block(adapter: Adapter, size: tuple[int, int]) -> None:
    """Run the model on one blank image, up to its first block."""

    def stop(*_: Any) -> None:
        raise _Stop

    like = adapter.parameter
    hook = adapter.blocks[0].register_forward_hook(in_this_thread(stop))
    try:
        adapter.forward(torch.zeros(1, adapter.in_chans, *size, dtype=like.dtype, device=like.device))
    except _Stop:
        return
    finally:
        hook.remove()
    raise RuntimeError(f"model: expected {type(adapter.model).__qualname__} to call its first block, which it did not")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Each parameter and buffer once, in the order of registration."""
    return chain(module.parameters(), module.buffers())


def _add_all(digest: hashlib._Hash, module: nn.Module, prefix: str) -> None:
    for name, tensor in module.state_dict().items():
        _add(digest, f"{prefix}{name}", tensor)


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
