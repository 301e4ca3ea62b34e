"""Sparse codes of SAEs with K codes per token: the K largest pre-activations, or the largest of each group."""

from __future__ import annotations

import torch
from torch import Tensor

POSTS = ("relu", "none")
RANKINGS = ("value", "magnitude")


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


def topk_ranked(pre: Tensor, k: int, ranking: str) -> tuple[Tensor, Tensor]:
    """The ``k`` pre-activations of ``pre`` [..., F] that rank first by value or by magnitude; of equals, the lowest."""
    if ranking == "value":
        return topk_lowest_index(pre, k)
    _, indices = topk_lowest_index(pre.abs(), k)
    return pre.gather(-1, indices), indices


def post_activate(values: Tensor, post: str) -> Tensor:
    return values.relu() if post == "relu" else values


def groupmax_lowest_index(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of ``k`` runs of neighbouring features, then ReLU: values and indices [..., K], by run."""
    runs = pre.unflatten(-1, (k, -1))
    values, within = topk_lowest_index(runs, 1)
    first = torch.arange(0, pre.shape[-1], runs.shape[-1], device=pre.device)
    return values.squeeze(-1).relu(), within.squeeze(-1) + first


def dense(values: Tensor, indices: Tensor, pre: Tensor) -> Tensor:
    """Sparse codes [..., K] as dense ones with the shape of ``pre`` [..., F]."""
    return torch.zeros_like(pre).scatter(-1, indices, values)


def encode_topk(
    x: Tensor,  # [T, d], already normalised
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    b_dec: Tensor | None,  # [d], or None: not subtracted
    k: int,
    post: str = "relu",
    ranking: str = "value",
) -> tuple[Tensor, Tensor]:
    """Values [T, K] in descending order of their rank, and indices [T, K]. Of equals, the lowest index comes first.

    With ``post="relu"``, values are >= 0. ``ranking`` is ``value`` or ``magnitude``.
    """
    centred = x if b_dec is None else x - b_dec
    values, indices = topk_ranked(centred.to(W_enc.dtype) @ W_enc + b_enc, k, ranking)
    return post_activate(values, post).to(x.dtype), indices


def encode_groupmax(
    x: Tensor,  # [T, d], already normalised
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    b_dec: Tensor | None,  # [d], or None: not subtracted
    k: int,  # it divides F
) -> tuple[Tensor, Tensor]:
    """Values [T, K] >= 0 and indices [T, K]: the largest pre-activation of each of K runs of F / K features."""
    centred = x if b_dec is None else x - b_dec
    values, indices = groupmax_lowest_index(centred.to(W_enc.dtype) @ W_enc + b_enc, k)
    return values.to(x.dtype), indices
