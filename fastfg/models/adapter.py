"""What the library knows of a model: its blocks, tokens, grid and pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A Vision Transformer as fastfg sees it.

    Args:
        model: the module; ``model(images)`` gives logits [B, n].
        blocks: its transformer blocks in order, each of them with one self-attention over all tokens. The
            output of block ``l`` is the residual stream ``x_l`` [B, N, d] ("resid_post").
        num_prefix_tokens: tokens before the patches (class token, registers).
        grid: image size (height, width) in pixels -> (gh, gw) in patches; raises ValueError for a size that
            the model does not take.
        in_chans: channels of the input image.
        pooled: which tokens the head reads, as a slice over the ``N`` tokens: ``slice(0, 1)`` for the class
            token; more than one are averaged.
        pixel_mean, pixel_std: per channel, the normalisation of the input; None where it is not known.
        flags: attributes that the model's modules must have while it is read (say, fused attention on); they
            are put back afterwards.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    num_prefix_tokens: int
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    in_chans: int
    pooled: slice
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameter(self) -> Tensor:
        """One floating-point parameter, which tells the model's dtype and device."""
        return next(p for p in self.model.parameters() if p.is_floating_point())

    def first_row(self, n_tokens: int, like: Tensor) -> Tensor:
        """The row [N] that relevancy starts from: the mean of the rows that the head reads."""
        row = torch.zeros(n_tokens, dtype=like.dtype, device=like.device)
        row[self.pooled] = 1.0
        return row / row.sum()
