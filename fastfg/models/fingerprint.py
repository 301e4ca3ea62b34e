"""Tell models apart by the weights that a block's output depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.models.adapter import Adapter
from fastfg.models.hold import hold
from fastfg.models.hooks import Stop, in_this_thread
from fastfg.torch_internals import tensors_used

SQUARES = [(side, side) for side in (224, *range(8, 1025))]  # tried as the size of the image that shows what is used
LONGEST = 64  # patches per side of other images


def fingerprints(adapter: Adapter, layers: Collection[int]) -> dict[int, str]:
    """{block: a hash of all weights that its output depends on: of the blocks up to it, and of others used until then}.

    Others are the patch embedding, or prompts that are added between blocks. A new head does not change it.
    """
    last, digest, found = max(layers), hashlib.sha256(), {}
    outside = _used_outside(adapter, last)
    for number, block in enumerate(adapter.blocks[: last + 1]):
        for tensor in outside[number]:
            _add(digest, "outside", tensor)  # without its name, which changes where a model is a part of another one
        _add_all(digest, block, f"{number} ")
        if number in layers:
            found[number] = digest.hexdigest()
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of all weights and buffers of ``module``."""
    digest = hashlib.sha256()
    _add_all(digest, module, "")
    return digest.hexdigest()


def _used_outside(adapter: Adapter, last: int) -> list[list[Tensor]]:
    """Per block up to ``last``: the weights outside the blocks so far that are used first until it has run.

    If no image is found that the model takes, all weights outside the blocks count with the first one.
    """
    tensors = list(_tensors(adapter.model))
    own = [{id(tensor) for tensor in _tensors(block)} for block in adapter.blocks]
    size = next(filter(partial(_takes, adapter), chain(SQUARES, _oblongs(adapter))), None)
    if size is None:
        inside = set().union(*own)
        return [[tensor for tensor in tensors if id(tensor) not in inside], *[[]] * last]
    counted: set[int] = set()
    found = []
    for number, used in enumerate(_used_until(adapter, size, last)):
        new = used - counted - own[number]
        found.append([tensor for tensor in tensors if id(tensor) in new])
        counted |= used | own[number]
    return found


def _oblongs(adapter: Adapter) -> Iterator[tuple[int, int]]:
    ph, pw = adapter.patch_size or (1, 1)
    return ((gh * ph, gw * pw) for gh, gw in product(range(1, LONGEST + 1), repeat=2))


def _takes(adapter: Adapter, size: tuple[int, int]) -> bool:
    try:
        adapter.grid(size)
    except ValueError:
        return False
    return True


def _used_until(adapter: Adapter, size: tuple[int, int], last: int) -> list[set[int]]:
    """The ids of all tensors used until block 0 has run on a blank image, until block 1 has run, ... up to ``last``."""
    found: list[set[int]] = []
    like = adapter.parameter
    image = torch.zeros(1, adapter.in_chans, *size, dtype=like.dtype, device=like.device)
    with hold(adapter.model, adapter.flags), torch.no_grad(), tensors_used() as used, ExitStack() as hooks:

        def ran(*_: Any) -> None:
            found.append(set(used))
            if len(found) > last:
                raise Stop

        for block in adapter.blocks[: last + 1]:
            hooks.callback(block.register_forward_hook(in_this_thread(ran)).remove)
        with suppress(Stop):
            adapter.forward(image)
    if len(found) <= last:
        name = type(adapter.model).__qualname__
        raise RuntimeError(f"model: expected {name} to call its blocks as modules, block(x), got {len(found)} calls")
    return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Each parameter and buffer once, in the order of registration."""
    return chain(module.parameters(), module.buffers())


def _add_all(digest: hashlib._Hash, module: nn.Module, prefix: str) -> None:
    for name, tensor in module.state_dict().items():
        _add(digest, f"{prefix}{name}", tensor)


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
