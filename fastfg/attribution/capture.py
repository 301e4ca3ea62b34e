"""Meet attention where every family calls it: ``F.scaled_dot_product_attention``.

Inside a :class:`Capture` each attention of the model runs as it always does, fused. A hook on its output then
receives ``dO`` during the backward pass, which visits the blocks from the last to the first; with ``q, k, v``
that is all that relevancy needs, so no attention map is ever kept.

The output of the FIRST attention becomes the leaf of the graph: nothing before it is recorded, and the
backward pass ends there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfg.models.adapter import Adapter, resid_post

OnAttention = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]  # number, q, k, v, dO, scale
OnResidual = Callable[[int, Tensor, Tensor], None]  # block, x, g

_active = threading.local()  # .stack: the captures that this thread is in, the innermost last


class Capture(TorchFunctionMode):
    """While active, in this thread: meets every attention and the residual stream of chosen blocks.

    Args:
        adapter: the model. layers: the blocks whose output ``x_l`` and gradient ``g_l`` are wanted.
        on_residual: called with (block, x [B, N, d], g [B, N, d]) when the gradient at ``x_l`` is complete,
            which is before the attention of that block is reached.
        on_attention: called with (number, q, k, v, dO, scale), tensors [B, H, N, dh]; the attention of block
            ``l`` is number ``l``, and a pooling head's comes after the last block's.
        root: where the backward pass ends, a leaf that requires gradients; None is the first attention's output.
    """

    def __init__(
        self,
        adapter: Adapter,
        layers: Collection[int],
        on_residual: OnResidual,
        on_attention: OnAttention,
        root: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.adapter, self.layers = adapter, layers
        self.on_residual, self.on_attention = on_residual, on_attention
        self.met = 0  # attentions seen
        self.root = root
        self.handles: list[Any] = []

    def __enter__(self) -> Capture:
        _active.stack = [*getattr(_active, "stack", []), self]
        for block in self.layers:
            self.handles.append(self.adapter.blocks[block].register_forward_hook(self._residual_hook(block)))
        if self.adapter.meet is not None:
            self.handles += self.adapter.meet(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _active.stack = [capture for capture in _active.stack if capture is not self]
        for handle in self.handles:
            handle.remove()
        self.root = None  # its hook refers back to this object

    def mine(self) -> bool:
        """Whether what is running now is this capture's model: not another thread's, nor a call inside the call."""
        return getattr(_active, "stack", [])[-1:] == [self]

    def backward(self, y: Tensor) -> Tensor:
        """Run the backward pass of the scalar ``y`` as far as the root; the callbacks do the work.

        Returns the gradient at the root.
        """
        expected = len(self.adapter.blocks) + self.adapter.later_attentions
        if self.met != expected or self.root is None:
            raise RuntimeError(
                f"model: expected one attention in each of its {len(self.adapter.blocks)} blocks and "
                f"{self.adapter.later_attentions} after them, met {self.met}. fastfg meets calls of "
                "F.scaled_dot_product_attention and nn.MultiheadAttention: switch the model's other kinds of attention "
                "to one of these, or give a fastfg.models.Adapter with its own `meet`"
            )
        (gradient,) = torch.autograd.grad(y, self.root)
        return gradient

    def meet(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, transposed: bool = False) -> Tensor:
        """Register one attention; returns the output to go on with, which takes the place of ``out``.

        Args:
            q, k, v: [B, H, N, dh]. out: [B, H, N, dh], or [B, N, H, dh] where ``transposed``.
        """
        if self.root is None:
            out = self.root = out.detach().requires_grad_()
        number, q, k, v = self.met, q.detach(), k.detach(), v.detach()

        def arrive(dO: Tensor) -> None:
            self.on_attention(number, q, k, v, dO.transpose(1, 2) if transposed else dO, scale)

        out.register_hook(arrive)
        self.met += 1
        return out

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.mine():
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Its inner call can't be met from here, where the mode is off: run the library's own code with two
            # of its names replaced, in a copy that no one else sees. The weights are only averaged for return.
            names = {"scaled_dot_product_attention": self._attention, "has_torch_function": lambda *_: False}
            own = FunctionType(func.__code__, func.__globals__ | names, func.__name__, func.__defaults__)
            return own(*args, **kwargs | {"need_weights": False})
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"), args, strict=False)) | kwargs
        for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa"):
            if isinstance(options.get(name), Tensor) or options.get(name):
                raise ValueError(f"model: expected plain self-attention in every block, got {name}={options[name]!r}")
        out = F.scaled_dot_product_attention(query, key, value, **options)
        return self.meet(query, key, value, out, options.get("scale") or query.shape[-1] ** -0.5)

    def _residual_hook(self, block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.mine():
                stream = resid_post(output)
                x = stream.detach()
                stream.register_hook(lambda g: self.on_residual(block, x, g))

        return hook
