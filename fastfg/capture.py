"""Meet attention where every family calls it: ``F.scaled_dot_product_attention``.

Inside a :class:`Capture` each attention of the model runs as it always does, fused. A hook on its output then
receives ``dO`` during the backward pass, which visits the blocks from the last to the first; with ``q, k, v``
that is all that relevancy needs, so no attention map is ever kept.

The output of the FIRST attention becomes the leaf of the graph: nothing before it is recorded, and the
backward pass ends there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OnAttention = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]  # block, q, k, v, dO, scale
OnResidual = Callable[[int, Tensor, Tensor], None]  # block, x, g


class Capture(TorchFunctionMode):
    """While active, in this thread: meets every attention and the residual stream of chosen blocks.

    Args:
        blocks: the model's transformer blocks, in order.
        layers: the blocks whose output ``x_l`` and gradient ``g_l`` are wanted.
        on_residual: called with (block, x [B, N, d], g [B, N, d]) when the gradient at ``x_l`` is complete,
            which is before the attention of that block is reached.
        on_attention: called with (block, q, k, v, dO, scale), tensors [B, H, N, dh].
    """

    def __init__(
        self, blocks: Sequence[nn.Module], layers: Collection[int], on_residual: OnResidual, on_attention: OnAttention
    ) -> None:
        super().__init__()
        self.blocks, self.layers = blocks, layers
        self.on_residual, self.on_attention = on_residual, on_attention
        self.met = 0  # attentions seen
        self.root: Tensor | None = None  # the first attention's output
        self.thread = threading.get_ident()
        self.handles: list[Any] = []

    def __enter__(self) -> Capture:
        for block in self.layers:
            self.handles.append(self.blocks[block].register_forward_hook(self._residual_hook(block)))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()
        self.root = None  # its hook refers back to this object

    def backward(self, y: Tensor) -> None:
        """Run the backward pass of the scalar ``y`` as far as the first attention; the callbacks do the work."""
        if self.met != len(self.blocks) or self.root is None:
            raise RuntimeError(
                f"model: expected one F.scaled_dot_product_attention in each of its {len(self.blocks)} blocks, met "
                f"{self.met} (another kind of attention, or fused attention that this family's adapter left off?)"
            )
        torch.autograd.grad(y, self.root)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"), args, strict=False)) | kwargs
        for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa"):
            if isinstance(options.get(name), Tensor) or options.get(name):
                raise ValueError(f"model: expected plain self-attention in every block, got {name}={options[name]!r}")
        out = F.scaled_dot_product_attention(query, key, value, **options)
        if self.root is None:
            out = self.root = out.detach().requires_grad_()
        block, scale = self.met, options.get("scale") or query.shape[-1] ** -0.5
        q, k, v = query.detach(), key.detach(), value.detach()
        out.register_hook(lambda dO: self.on_attention(block, q, k, v, dO, scale))
        self.met += 1
        return out

    def _residual_hook(self, block: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if threading.get_ident() != self.thread:
                return  # another thread runs the same model
            x = output.detach()
            output.register_hook(lambda g: self.on_residual(block, x, g))

        return hook
