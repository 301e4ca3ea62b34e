"""Sparse codes of a TopK SAE: the K largest pre-activations per token, then ReLU."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_lowest_index(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values of ``x`` [..., F] in descending order; among equal values, the lowest index comes first.

    NaN ranks above all numbers, and NaNs rank as equal. ``torch.topk`` does not specify which of several equal values
    at the threshold it takes, so tokens with ties there are selected again.
    """
    values, indices = x.topk(k, dim=-1)
    threshold = values[..., -1:]
    tied = (x < threshold).sum(-1, keepdim=True) < x.shape[-1] - k  # more than k at or above it; no NaN is below
    if torch.compiler.is_compiling() or bool(tied.any()):  # a traced program can't branch on values
        indices = torch.where(tied, _lowest_of_equal(x, threshold, k), indices)
    indices = indices.sort(dim=-1).values
    values, order = x.gather(-1, indices).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order)


def _lowest_of_equal(x: Tensor, threshold: Tensor, k: int) -> Tensor:
    """The values above the threshold and the first ones that equal it, ``k`` in all; NaN is above every number."""
    nan = threshold.isnan()
    above = ~nan & ~(x <= threshold)
    equal = torch.where(nan, x.isnan(), x == threshold)
    wanted = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))
    return chosen.byte().topk(k, dim=-1).indices


def encode_topk(
    x: Tensor,  # [T, d], already normalised
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    b_dec: Tensor | None,  # [d], or None: not subtracted
    k: int,
) -> tuple[Tensor, Tensor]:
    """Values [T, K] >= 0 in descending order, and indices [T, K]. Of equal values, the lowest index comes first."""
    centred = x if b_dec is None else x - b_dec
    values, indices = topk_lowest_index(centred.to(W_enc.dtype) @ W_enc + b_enc, k)
    return torch.relu(values).to(x.dtype), indices
