"""Tell models apart by the weights that a block's output depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.models.adapter import Adapter, resid_post
from fastfg.models.hold import hold

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
    """The weights outside the blocks that the first block's output depends on, such as the patch embedding.

    If that can't be found out, as for a model made in inference mode: all weights outside the blocks.
    """
    inside = {id(tensor) for block in adapter.blocks for tensor in _tensors(block)}
    outside = [tensor for tensor in _tensors(adapter.model) if id(tensor) not in inside]
    size = next(filter(partial(_takes, adapter), chain(SQUARES, _oblongs(adapter))), None)
    if size is None:
        return outside
    without = {id(tensor) for _, statistics in _statistics(adapter.model) for tensor in statistics}
    asked = [tensor for tensor in outside if tensor.is_floating_point() and id(tensor) not in without]
    if any(tensor.is_inference() for tensor in asked):
        return outside
    with hold(adapter.model, adapter.flags), torch.enable_grad(), _with_gradients(asked):
        gradients = torch.autograd.grad(_first_output(adapter, size).sum(), asked, allow_unused=True)
    used = {id(leaf) for leaf, gradient in zip(asked, gradients, strict=True) if gradient is not None}
    for weight, statistics in _statistics(adapter.model):
        used |= set(map(id, statistics)) if weight is None or id(weight) in used else set()
    return [tensor for tensor in outside if id(tensor) in used] or outside


def _oblongs(adapter: Adapter) -> Iterator[tuple[int, int]]:
    ph, pw = adapter.patch_size or (1, 1)
    return ((gh * ph, gw * pw) for gh, gw in product(range(1, LONGEST + 1), repeat=2))


def _statistics(model: nn.Module) -> list[tuple[Tensor | None, list[Tensor]]]:
    """The weight and the running statistics of each batch norm. Torch has no gradient for the statistics."""
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    return [(getattr(norm, "weight", None), list(norm.buffers(recurse=False))) for norm in norms]


def _takes(adapter: Adapter, size: tuple[int, int]) -> bool:
    try:
        adapter.grid(size)
    except ValueError:
        return False
    return True


class _Stop(Exception):  # noqa: N818  not an error
    """Ends a forward pass after the first block."""

    def __init__(self, stream: Tensor) -> None:
        self.stream = stream


def _first_output(adapter: Adapter, size: tuple[int, int]) -> Tensor:
    """The first block's output for one blank image, with the graph that it comes from."""

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Stop(resid_post(output))

    like = adapter.parameter
    hook = adapter.blocks[0].register_forward_hook(stop)
    try:
        adapter.forward(torch.zeros(1, adapter.in_chans, *size, dtype=like.dtype, device=like.device))
    except _Stop as stopped:
        return stopped.stream
    finally:
        hook.remove()
    raise RuntimeError(f"model: expected {type(adapter.model).__qualname__} to call its first block, which it did not")


@contextmanager
def _with_gradients(tensors: list[Tensor]) -> Iterator[None]:
    """Context in which ``tensors`` ask for a gradient."""
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, asked in zip(tensors, before, strict=True):
            tensor.requires_grad_(asked)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Each parameter and buffer once, in the order of registration."""
    return chain(module.parameters(), module.buffers())


def _add_all(digest: hashlib._Hash, module: nn.Module, prefix: str) -> None:
    for name, tensor in module.state_dict().items():
        _add(digest, f"{prefix}{name}", tensor)


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
