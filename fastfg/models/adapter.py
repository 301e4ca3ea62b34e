"""``Adapter``: what fastfg needs to know about a model, that is, its blocks, tokens, grid and pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastfg.targets import logits_of

CLASS_TOKEN = slice(0, 1)


class MeetsAttention(Protocol):
    """The argument of :attr:`Adapter.meet`. Its method ``meet`` must be called for each attention as it runs."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, transposed: bool = False) -> Tensor:
        """Report one attention: q, k, v [B, H, N, dh] and its output [B, H, N, dh] ([B, N, H, dh] if ``transposed``).

        Returns the output that the model must continue with, in place of ``out``.
        """


@dataclass(frozen=True)
class Adapter:
    """Describes a Vision Transformer to fastfg.

    Args:
        model: the module that is held still while it is read.
        forward: images [B, C, H, W] -> the model's output, which target functions get.
        blocks: the transformer blocks in order, each with one self-attention over all tokens. The output of block
            ``l`` is the residual stream ``x_l`` [B, N, d] ("resid_post"), alone or first in a tuple.
        num_prefix_tokens: tokens before the patches (class token, registers).
        grid: image size (height, width) in pixels -> (gh, gw) in patches; raises ValueError for a size that
            the model does not accept.
        in_chans: channels of the input image.
        pooled: the tokens that the head reads, as slices over the ``N`` tokens. The tokens of a slice are averaged,
            and all slices have the same weight. ``(slice(0, 1),)`` is the class token. Empty for an
            attention-pooling head.
        later_attentions: attentions after the blocks; 1 for an attention-pooling head.
        pixel_mean, pixel_std: the normalisation of the input, per channel; None if it is not known.
        flags: (object, attribute, value) triples that are set while the model is read, for example to switch fused
            attention on. The earlier values are restored afterwards.
        meet: needed if the attention is not ``F.scaled_dot_product_attention``. A function ``capture -> handles`` that
            registers hooks and yields the handle of each hook as soon as it is registered. The hooks call
            ``capture.meet``.
        patch_size: (height, width) of one patch in pixels. The first patch starts at the top left corner; pixels to
            the right of and below the last whole patch belong to no patch. None: the patches divide the image evenly.
        has_logits: whether the output has one logit per class. A tower without a head returns an embedding instead,
            and needs a target without classes.
        logits: the output -> its logits [B, n], or its embedding [B, n] if ``has_logits`` is False. By default,
            the output itself, or its field or key ``logits``.
    """

    model: nn.Module
    forward: Callable[[Tensor], Any]
    blocks: Sequence[nn.Module]
    num_prefix_tokens: int
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    in_chans: int
    pooled: tuple[slice, ...]
    later_attentions: int = 0
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    flags: tuple[tuple[Any, str, Any], ...] = ()
    meet: Callable[[MeetsAttention], Iterable[Any]] | None = None
    patch_size: tuple[int, int] | None = None
    has_logits: bool = True
    logits: Callable[[Any], Any] = logits_of

    @property
    def parameter(self) -> Tensor:
        """A floating-point parameter, which has the model's dtype and device. ValueError if there is none."""
        found = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if found is None:
            raise ValueError(f"model: expected floating-point parameters in {type(self.model).__name__}, got none")
        return found

    @property
    def n_rows(self) -> int | None:
        """How many tokens from the start contain all that the head reads; None if it also reads patches."""
        bounds = [(s.start or 0, s.stop or 0) for s in self.pooled]  # no stop: up to the last token
        if not bounds or any(start < 0 or not 0 < stop <= self.num_prefix_tokens for start, stop in bounds):
            return None
        return max(stop for _, stop in bounds)

    def patches(self, images: Tensor) -> tuple[int, int]:
        """The grid (gh, gw) of ``images`` [B, C, H, W]. Raises ValueError for a grid that does not fit them."""
        size = (images.shape[-2], images.shape[-1])
        gh, gw = grid = self.grid(size)
        ph, pw = self.patch_size or (size[0] // max(gh, 1), size[1] // max(gw, 1))
        rest = size[0] - gh * ph, size[1] - gw * pw
        fits = 0 <= rest[0] < ph and 0 <= rest[1] < pw if self.patch_size else rest == (0, 0)
        if gh < 1 or gw < 1 or not fits:
            of = f"patches of {ph} x {pw} pixels" if self.patch_size else "patches that divide the image evenly"
            raise ValueError(
                f"grid: expected (gh, gw) {of} for images of {size[0]} x {size[1]}, got {tuple(grid)} from the adapter"
            )
        return grid

    def first_row(self, n_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The row [N] that relevancy starts from: the mean of the rows that the head reads."""
        row = torch.zeros(n_tokens, dtype=dtype, device=device)
        for tokens in self.pooled:
            if not len(row[tokens]):
                raise ValueError(
                    f"pooled: expected slices that each contain some of the {n_tokens} tokens, got {tokens}"
                )
            row[tokens] += 1 / (len(self.pooled) * len(row[tokens]))
        return row


def patch_grid(
    size: tuple[int, int],
    patch: tuple[int, int],
    native: tuple[int, int] | None = None,
    only_native: bool = False,
    hint: str = "",
) -> tuple[int, int]:
    """The grid (gh, gw) of an image of ``size`` pixels in patches of ``patch`` pixels, both (height, width).

    At its ``native`` size a model leaves out the pixels that do not fill a patch (384 pixels are 27 patches of 14).
    Other sizes must be multiples of the patch; with ``only_native`` they are refused.
    """
    (height, width), (ph, pw) = size, patch
    if native is not None and tuple(size) == tuple(native):
        return height // ph, width // pw
    if native is not None and only_native:
        raise ValueError(
            f"images: expected {native[0]} x {native[1]} pixels for this model, got {height} x {width}{hint}"
        )
    if height % ph or width % pw:
        raise ValueError(f"images: expected sides that are multiples of the patch {ph} x {pw}, got {height} x {width}")
    return height // ph, width // pw


def is_head(module: nn.Module) -> bool:
    """Whether ``module`` computes logits. False for identities and dropout, which only pass features on."""
    parts = [m for m in module.modules() if not isinstance(m, nn.Sequential)]
    return not all(isinstance(m, (nn.Identity, nn.Dropout)) for m in parts)


def pair(value: Any) -> tuple[int, int]:
    """An int as (int, int); a pair unchanged."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def check_distinct(adapter: Adapter) -> None:
    """Raise RuntimeError if one module stands for several blocks."""
    blocks = adapter.blocks
    shared = [i for i, block in enumerate(blocks) if any(block is other for other in blocks[:i])]
    if shared:
        name = type(adapter.model).__qualname__
        raise RuntimeError(f"model: expected {len(blocks)} distinct blocks in {name}, got {shared} twice")


def resid_post(output: Any) -> Tensor:
    """The residual stream in a block's output: the output itself, or the first element of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def stream_of(output: Any, block: int, shape: tuple[int, int]) -> Tensor:
    """:func:`resid_post`. Raises RuntimeError if it is not [B, N, d], for the ``shape`` (B, N)."""
    stream = resid_post(output)
    if not isinstance(stream, Tensor) or stream.ndim != 3 or tuple(stream.shape[:2]) != shape:
        got = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        B, N = shape
        raise RuntimeError(f"model: expected the output of block {block} to be [{B}, {N}, d], got {got}")
    return stream
