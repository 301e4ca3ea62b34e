"""Read the residual stream at chosen blocks of a model, to train or inspect SAEs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastfg.checks import check_images, check_layers
from fastfg.models import Adapter, adapt
from fastfg.models.adapter import check_distinct, stream_of
from fastfg.models.first_rows import made_of
from fastfg.models.hold import hold
from fastfg.models.hooks import Stop, in_this_thread, is_ours
from fastfg.torch_internals import hooks_of
from fastfg.types import integers

# Blocks of models that ran in full and called each block once and in order, and what the models were made of then
_in_order: WeakKeyDictionary[nn.Module, tuple[object, ...]] = WeakKeyDictionary()


def residuals(model: nn.Module | Adapter, images: Tensor, layers: int | Iterable[int]) -> dict[int, Tensor]:
    """The residual stream ``x_l`` at the patches: {block: [B, P, d]} for each 0-based block of ``layers``.

    The tensors have no gradients. The first forward pass of a model runs in full. Later ones end after the last of
    ``layers``, except where the model has hooks of the user's own.

    Raises ValueError or TypeError that names the argument, and RuntimeError where the model does not run each block at
    most once, in order, with an output [B, N, d].

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.residuals(model, torch.randn(2, 3, 32, 32), layers=[1])[1].shape
    torch.Size([2, 4, 192])
    """
    adapter = adapt(model)
    check_images(images, adapter.in_chans, adapter.parameter)
    gh, gw = adapter.patches(images)
    layers = integers("layers", layers)
    check_layers("layers", layers, len(adapter.blocks))
    check_distinct(adapter)
    given = images.clone() if len(images) else images.new_zeros(1, *images.shape[1:])  # many can't run no images
    shape = (len(given), adapter.num_prefix_tokens + gh * gw)
    found: dict[int, Tensor] = {}
    ran: list[int] = []
    last = adapter.blocks[max(layers)] if layers else None
    stops = (
        last is not None
        and _in_order.get(last) == made_of(adapter.model)
        and all(is_ours(hook) for hook in hooks_of(adapter.model))
    )

    def keep(block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            ran.append(block)
            if block in layers:
                x = stream_of(output, block, shape)
                found[block] = x[: len(images), adapter.num_prefix_tokens :].clone()
            if stops and module is last:
                raise Stop

        return hook

    with hold(adapter.model), torch.no_grad(), suppress(Stop), ExitStack() as hooks:
        for number, block in enumerate(adapter.blocks):
            hooks.callback(block.register_forward_hook(in_this_thread(keep(number))).remove)
        adapter.forward(given)
    _check_order(type(adapter.model).__qualname__, ran, layers)
    if last is not None and not stops:
        _in_order[last] = made_of(adapter.model)
    return found


def _check_order(name: str, ran: list[int], layers: Sequence[int]) -> None:
    """Check that the wanted blocks ran, and that no block ran twice or before an earlier one."""
    missing = [block for block in layers if block not in ran]
    if missing:
        raise RuntimeError(
            f"model: expected {name} to call its blocks as modules, block(x), but it did not call {missing}"
        )
    if ran != sorted(set(ran)):
        raise RuntimeError(f"model: expected {name} to run its blocks once each and in order, but it ran {ran}")
