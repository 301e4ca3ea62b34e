"""Perturb tokens instead of pixels: a removed patch is a replaced token in the input of the first block.

Everything before the first attention acts on each token separately. So a view (an image and the fill of its removed
patches) has two states per token, original and filled. Both are computed once: the input of the first block, and the
outputs of the linear layers before its attention (q, k, v). A perturbed image picks one of the two states per token. In
the last block, everything after the attention is computed only for the tokens that the head reads.

Hooks do this on the unchanged model, for every family. ``fastfg.perturb.choose`` first compares the tokens and logits
with those of the perturbed pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfg.models.adapter import Adapter, resid_post
from fastfg.models.hooks import in_this_thread


class Tokens:
    """The path for models of a known family (see :class:`fastfg.perturb.ForwardPath`).

    Args:
        adapter: the model. Use this only while the model is held still with the adapter's flags set.
        precision: a context for everything up to the last block (``fastfg.perturb.Precision``). The rest is computed
            in the images' own dtype. None: everything is.
        all_rows: whether the last block computes all tokens, not only those that the head reads.
    """

    def __init__(self, adapter: Adapter, precision: Any = None, all_rows: bool = False) -> None:
        self.adapter, self.precision = adapter, precision
        self.first, self.last = adapter.blocks[0], adapter.blocks[-1]
        self.n_rows = None if all_rows else adapter.n_rows
        self.early: list[nn.Module] = []  # linear layers before the first attention
        self.n_tokens = 0
        self._blank: Tensor  # one image, to call the model with

    def prepare(self, images: Tensor, fills: Sequence[Tensor]) -> list[Tensor]:
        """The two states (original, filled) of the views' tokens: of the stream, then of each layer in ``early``.

        Each tensor is [V, 2, N, width].
        """
        filled = torch.stack([fill.expand(images.shape[1:]) for fill in fills])
        whole, other = self._states(images), self._states(filled)  # one after the other, to save memory
        self._blank = torch.zeros_like(images[:1])
        return [torch.stack(pair, dim=1) for pair in zip(whole, other, strict=True)]

    def stream(self, images: Tensor) -> Tensor:
        """The first block's input [n, N, width] for unperturbed ``images``."""
        return self._states(images)[0]

    def _states(self, images: Tensor) -> list[Tensor]:
        """The first block's input, and the outputs of the linear layers before its attention, each [n, N, width]."""
        seen = _Before(self.first)
        with ExitStack() as stack:
            stack.enter_context(seen)
            if self.precision is not None:
                stack.enter_context(self.precision())
            with suppress(_Enough):
                self.adapter.forward(images)
        self.early, self.n_tokens = seen.linears, seen.stream.shape[1]
        return [seen.stream, *seen.outputs]

    def inputs(
        self, prepared: list[Tensor], view: Tensor, masks: Tensor, left: int | None = None
    ) -> tuple[Tensor, ...]:
        N = self.n_tokens
        removed = F.pad(masks, (N - masks.shape[-1], 0))  # prefix tokens stay
        chosen = (2 * view[:, None] + removed) * N + torch.arange(N, device=masks.device)
        return tuple(taken(state.flatten(0, 2), chosen) for state in prepared)

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The model's output from the chosen tokens: the stream [n, N, d], and the outputs of ``early``."""
        with ExitStack() as stack:
            return self._from_states(inputs, stack)

    def _from_states(self, inputs: Sequence[Tensor], stack: ExitStack) -> Any:
        """The forward from the first block on, for any number of tokens."""
        stream, *outputs = inputs
        for module, output in zip(self.early, outputs, strict=True):
            stack.enter_context(_given(module, output))
        stack.enter_context(_enters(self.first, stream))
        if self.n_rows is not None:
            stack.enter_context(_RowsRead(self.last, stream.shape[1], self.n_rows))
        return self._forward(self._blank, stack)

    def whole(self, images: Tensor) -> Any:
        with ExitStack() as stack:
            return self._forward(images, stack)

    def _forward(self, images: Tensor, stack: ExitStack) -> Any:
        """The model's forward. The precision context ends at the last block's output."""
        inner = stack.enter_context(ExitStack())
        if self.precision is not None:
            inner.enter_context(self.precision())

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            inner.close()
            stream = resid_post(output)
            wide = stream.to(images.dtype)
            return wide if output is stream else (wide, *output[1:])

        stack.callback(self.last.register_forward_hook(in_this_thread(leave)).remove)
        return self.adapter.forward(images)


def taken(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The tokens [n, N, width] whose numbers among ``tokens`` [T, width] are ``chosen`` [n, N]."""
    return tokens.index_select(0, chosen.flatten()).reshape(*chosen.shape, tokens.shape[-1])


class _Enough(Exception):  # noqa: N818
    """Ends the model's forward when everything needed has been recorded."""


class _Before(TorchFunctionMode):
    """Records the first block's input and the linear layers before its attention, then ends the forward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.linears: list[nn.Module] = []
        self.outputs: list[Tensor] = []
        self.stream: Tensor
        self.inside = False

    def __enter__(self) -> _Before:
        self.handles = [
            self.block.register_forward_pre_hook(in_this_thread(self._enter), with_kwargs=True),
            self.block.register_forward_hook(in_this_thread(self._leave)),
            *(
                m.register_forward_hook(in_this_thread(self._linear))
                for m in self.block.modules()
                if isinstance(m, nn.Linear)
            ),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside, self.stream = True, (*args, *kwargs.values())[0]

    def _linear(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.linears.append(module)
        self.outputs.append(output)

    def _leave(self, *_: Any) -> None:
        """No attention was intercepted: it is of another kind, so the linear layers before it are not known."""
        self.linears, self.outputs = [], []
        raise _Enough

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            raise _Enough
        return func(*args, **(kwargs or {}))


@contextmanager
def _enters(block: nn.Module, stream: Tensor) -> Iterator[None]:
    """Replace the input of ``block`` with ``stream``."""

    def replace(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (stream, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): stream}

    handle = block.register_forward_pre_hook(in_this_thread(replace), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _given(linear: nn.Module, output: Tensor) -> Iterator[None]:
    """Replace the output of ``linear`` with ``output``. The layer runs on one token, so that its other hooks run."""
    handles = [
        linear.register_forward_pre_hook(in_this_thread(lambda module, args: args[0][:1, :1])),
        linear.register_forward_hook(in_this_thread(lambda module, args, computed: output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _RowsRead(TorchFunctionMode):
    """Computes only the first ``n_rows`` of ``n_tokens`` in the last block, from its attention on.

    The residual stream keeps its shape. A single row is broadcast to all tokens, because the head reads only the
    first one. Several rows are padded with zeros.
    """

    def __init__(self, block: nn.Module, n_tokens: int, n_rows: int) -> None:
        super().__init__()
        self.block, self.n_tokens, self.n_rows = block, n_tokens, n_rows
        self.inside = self.met = False

    def __enter__(self) -> _RowsRead:
        self.handles = [
            self.block.register_forward_pre_hook(in_this_thread(self._enter)),
            self.block.register_forward_hook(in_this_thread(self._leave)),
        ]
        for module in self.block.modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_pre_hook(in_this_thread(self._cut)))
                self.handles.append(module.register_forward_hook(in_this_thread(self._fill_up)))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        self.inside = True

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def _cut(self, module: nn.Module, args: Any) -> Any:
        x = args[0]
        if self.met and x.ndim == 3 and x.shape[1] == self.n_tokens:
            return (x[:, : self.n_rows], *args[1:])
        return args

    def _fill_up(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        cut = self.met and self.n_rows > 1 and output.ndim == 3 and output.shape[1] == self.n_rows
        return F.pad(output, (0, 0, 0, self.n_tokens - self.n_rows)) if cut else output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head,
        }
        if self.inside and func in special:
            self.met = True
            return special[func](func, *args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, func: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = func(query[..., : self.n_rows, :], *args, **kwargs)  # [n, H, rows, dh]
        if self.n_rows == 1:
            return out.expand(*out.shape[:-2], self.n_tokens, out.shape[-1])
        return F.pad(out, (0, 0, 0, self.n_tokens - self.n_rows))

    def _multi_head(self, func: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = func(query[: self.n_rows], *args, **kwargs)  # [rows, n, d]
        if self.n_rows > 1:
            out = F.pad(out, (0, 0, 0, 0, 0, self.n_tokens - self.n_rows))
        return out, weights
