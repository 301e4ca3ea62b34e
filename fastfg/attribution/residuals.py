"""Read the residual stream at chosen blocks of a model, to train or inspect SAEs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.checks import check_images, check_layers
from fastfg.models import Adapter, adapt
from fastfg.models.adapter import resid_post
from fastfg.models.hold import hold
from fastfg.models.hooks import in_this_thread


def residuals(model: nn.Module | Adapter, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream ``x_l`` at the patches: {block: [B, P, d]} for each 0-based block of ``layers``.

    The tensors have no gradients. Raises ValueError or TypeError that names the argument.

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.residuals(model, torch.randn(2, 3, 32, 32), layers=[1])[1].shape
    torch.Size([2, 4, 192])
    """
    adapter = adapt(model)
    check_images(images, adapter.in_chans, adapter.parameter)
    adapter.grid((images.shape[-2], images.shape[-1]))
    check_layers("layers", layers, len(adapter.blocks))
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[block] = resid_post(output)[: len(images), adapter.num_prefix_tokens :].clone()

        return hook

    with hold(adapter.model), torch.no_grad(), ExitStack() as hooks:
        for block in layers:
            handle = adapter.blocks[block].register_forward_hook(in_this_thread(keep(block)))
            hooks.callback(handle.remove)
        adapter.forward(images if len(images) else images.new_zeros(1, *images.shape[1:]))  # many can't run no images
    missing = [block for block in layers if block not in found]
    if missing:
        raise RuntimeError(
            f"model: expected {type(adapter.model).__qualname__} to call its blocks as modules, block(x), but it did "
            f"not call {missing}"
        )
    return found
