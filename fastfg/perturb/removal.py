"""Remove patches: their tokens leave the sequence after the position embedding (Jain et al. 2022, Covert et al. 2023).

Class token, registers and the positions of the kept patches stay. The input of the first block and the outputs of the
linear layers before its attention are computed once per image. A perturbed image gathers those of its kept tokens. A
batch holds masks that keep the same number of patches, of any images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastfg.models.hooks import in_this_thread
from fastfg.perturb.tokens import Tokens, taken

# without cuDNN's attention, which prepares itself anew, for about 0.1 s, for each number of tokens
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Removal(Tokens):
    """The path of removed views, for models of a known family (see :class:`fastfg.perturb.ForwardPath`)."""

    def prepare(self, images: Tensor, fills: Sequence[Any]) -> list[Tensor]:
        """The views' tokens: of the stream, then of each layer in ``early``, each [V, N, width]. No fill is used."""
        self._blank = torch.zeros_like(images[:1])
        return self._states(images)

    def inputs(
        self, prepared: list[Tensor], view: Tensor, masks: Tensor, left: int | None = None
    ) -> tuple[Tensor, ...]:
        """The kept tokens of each perturbed image, then the numbers [n, left] of the kept patches."""
        P = masks.shape[1]
        left = P - int(masks[0].sum()) if left is None else left
        kept = masks.byte().argsort(dim=1, stable=True)[:, :left]
        tokens = kept_tokens(kept, self.n_tokens - P)
        chosen = view[:, None] * self.n_tokens + tokens
        return *(taken(state.flatten(0, 1), chosen) for state in prepared), kept

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The model's output from the kept tokens."""
        *states, kept = inputs
        with ExitStack() as stack:
            for block in self.adapter.blocks:
                stack.enter_context(_positions(block, kept, self.n_patches))
            if kept.is_cuda:
                stack.enter_context(sdpa_kernel(ANY_LENGTH))
            return self._from_states(states, stack)

    @property
    def n_patches(self) -> int:
        return self.n_tokens - self.adapter.num_prefix_tokens

    def one(self, image: Tensor, kept: Tensor) -> Any:
        """The output for ``image`` [1, C, H, W] when the blocks get the patches ``kept`` [k] alone, in that order.

        No shortcut is taken: this checks the others.
        """
        tokens = kept_tokens(kept[None], self.adapter.num_prefix_tokens)[0]

        def drop(module: nn.Module, args: Any, kwargs: Any) -> Any:
            stream = (*args, *kwargs.values())[0]
            self.n_tokens = stream.shape[1]
            if args:
                return (stream[:, tokens], *args[1:]), kwargs
            return args, kwargs | {next(iter(kwargs)): stream[:, tokens]}

        self._states(image.clone())  # sets n_tokens; a model may change its input in place
        with ExitStack() as stack:
            handle = self.first.register_forward_pre_hook(in_this_thread(drop), with_kwargs=True)
            stack.callback(handle.remove)
            for block in self.adapter.blocks:
                stack.enter_context(_positions(block, kept[None], self.n_patches))
            return self.adapter.forward(image.clone())

    def reads_prefix_alone(self, images: Tensor) -> bool:
        """Whether the model has an output when every patch of ``images`` [1, C, H, W] is removed.

        A model without prefix tokens has none, nor has one whose head averages or attends to the patches alone.
        """
        prefix = self.adapter.num_prefix_tokens
        if not prefix or not all(len(range(prefix)[tokens]) for tokens in self.adapter.pooled):
            return False
        kept = torch.empty(0, dtype=torch.long, device=images.device)
        with _Attends() as attends:
            self.one(images, kept)
        return not attends.to_nothing


def kept_tokens(kept: Tensor, prefix: int) -> Tensor:
    """The numbers [n, prefix + k] of the tokens that stay: the prefix, then the patches ``kept`` [n, k]."""
    first = torch.arange(prefix, device=kept.device).expand(len(kept), prefix)
    return torch.cat([first, kept + prefix], dim=1)


@contextmanager
def _positions(block: nn.Module, kept: Tensor, n_patches: int) -> Iterator[None]:
    """Cut the rotary positions that ``block`` gets to the patches ``kept`` [n, k]."""

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        rope = kwargs.get("rope")
        return None if rope is None else (args, kwargs | {"rope": _kept_positions(rope, kept, n_patches)})

    handle = block.register_forward_pre_hook(in_this_thread(cut), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _kept_positions(rope: Any, kept: Tensor, n_patches: int) -> Tensor:
    """Rotary positions [P, width] or [H, P, width] of all patches -> those of ``kept``, [n, 1 or H, k, width]."""
    if not isinstance(rope, Tensor) or rope.ndim not in (2, 3) or rope.shape[-2] != n_patches:
        got = list(rope.shape) if isinstance(rope, Tensor) else type(rope).__name__
        raise ValueError(f"its rotary positions are not one per patch, [{n_patches}, width]: {got}")
    return rope[kept].unsqueeze(1) if rope.ndim == 2 else rope[:, kept].transpose(0, 1)


class _Attends(TorchFunctionMode):
    """Notes whether an attention has no token to attend to."""

    to_nothing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            key = args[1] if len(args) > 1 else kwargs["key"]
            self.to_nothing |= key.numel() == 0
        return func(*args, **kwargs)
