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

    Others are the patch embedding, prompts that are added between blocks, and buffers in a block that its state dict
    leaves out. A new head does not change it. A buffer of one whole number that each forward pass changes is a counter,
    and does not count.
    """
    last, digest, found = max(layers), hashlib.sha256(), {}
    size = next(filter(partial(_takes, adapter), chain(SQUARES, _oblongs(adapter))), None)
    counters = set() if size is None else _counters(adapter, size, last)
    outside = _used_outside(adapter, size, last, counters)
    not_counted = {id(buffer) for name, buffer in adapter.model.named_buffers() if name in counters}
    for number, block in enumerate(adapter.blocks[: last + 1]):
        for tensor in outside[number]:
            _add(digest, "outside", tensor)  # without its name, which changes where a model is a part of another one
        _add_all(digest, block, f"{number} ", not_counted)
        if number in layers:
            found[number] = digest.hexdigest()
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of all weights and buffers in the state dict of ``module``, counters included.

    Buffers that are not saved (``persistent=False``) are left out: the module's code makes them.
    """
    digest = hashlib.sha256()
    _add_all(digest, module, "", set())
    return digest.hexdigest()


def _counters(adapter: Adapter, size: tuple[int, int], last: int) -> set[str]:
    """The names of buffers of one whole number that a forward pass changes. This pass also fills caches."""

    def numbers() -> dict[str, int]:
        every = adapter.model.named_buffers()
        return {name: int(t) for name, t in every if t.ndim == 0 and not t.is_floating_point() and not t.is_complex()}

    before = numbers()
    _used_until(adapter, size, last)
    return {name for name, number in numbers().items() if before.get(name) != number}


def _used_outside(
    adapter: Adapter, size: tuple[int, int] | None, last: int, counters: Collection[str]
) -> list[list[Tensor]]:
    """Per block up to ``last``: the weights in no block's state dict that are used first until it has run.

    ``size``: of an image that the model takes. If none is known, all these weights count with the first block.
    """
    every = chain(adapter.model.named_parameters(), adapter.model.named_buffers())
    tensors = [tensor for name, tensor in every if name not in counters]
    own = [{id(tensor) for tensor in block.state_dict(keep_vars=True).values()} for block in adapter.blocks]
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


def _add_all(digest: hashlib._Hash, module: nn.Module, prefix: str, not_counted: Collection[int]) -> None:
    """Add the state dict of ``module``, without tensors whose ids are in ``not_counted``."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in not_counted:
            _add(digest, f"{prefix}{name}", tensor)


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
