"""``encode_topk``: the K largest pre-activations of each token, then ReLU, and the variants of other SAEs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_shapes
from fastfg.ops.dispatch import choose, detached, only_reference, register, torch_op
from fastfg.reference.encode_topk import POSTS, RANKINGS

TOKENS_AT_ONCE = 1024  # for the variants, which form the pre-activations [T, F] in full


@register
def _encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


@detached
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int,
    *,
    post: str = "relu",
    ranking: str = "value",
    groups: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sparse codes of a TopK SAE.

    Args:
        x: [T, d] residual stream, already normalised.
        W_enc: [d, F] encoder, with ``x``'s dtype.
        b_enc: [F]. Its dtype may differ from ``x``'s.
        b_dec: [d], or None for an SAE that does not subtract it. Its dtype may differ from ``x``'s.
        k: active features per token, from 1 to F.
        post: ``relu``, or ``none`` to keep the sign of the chosen pre-activations.
        ranking: ``value``, or ``magnitude`` to choose the K largest absolute values.
        groups: whether the K codes are the largest of each of K runs of F / K neighbouring features.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``. The reference alone has another ``post``, another
            ``ranking`` and ``groups``.

    Returns:
        Values [T, K] in descending order of their rank, with ``x``'s dtype, and indices [T, K] int64. With
        ``post="relu"`` they are >= 0. Of equal values, the one with the lowest index is taken first. With ``groups``
        they are in the order of the runs.

    Raises:
        ValueError: for shapes that don't fit, ``k`` out of range or not a divisor of F with ``groups``, or an unknown
            ``post`` or ``ranking``.
        BackendError: if the named backend can't run; the message has every reason.

    Source: the TopK SAEs of Gao et al. 2024, arXiv 2406.04093.
    """
    sizes: dict[str, int] = {}
    check_shapes(sizes, W_enc=(W_enc, "d F"), x=(x, "T d"), b_enc=(b_enc, "F"), b_dec=(b_dec, "d"))
    if isinstance(k, bool):
        raise ValueError(f"k: expected an int, got {k}")
    if not 1 <= k <= sizes["F"]:
        raise ValueError(f"k: expected 1 to {sizes['F']}, got {k}")
    _check_variant(sizes["F"], k, post, ranking, groups)
    if groups or (post, ranking) != ("relu", "value"):
        only_reference("encode_topk", backend, f"groups={groups}, post={post!r}, ranking={ranking!r}")
        return _variant(x, W_enc, b_enc, b_dec, k, post, ranking, groups)
    chosen = choose("encode_topk", backend, x.device, x.dtype)
    if chosen == "reference":
        return reference.encode_topk(x, W_enc, b_enc, b_dec, k)
    return torch_op("encode_topk", chosen)(x, W_enc, b_enc, b_dec, k)


def _check_variant(F: int, k: int, post: str, ranking: str, groups: bool) -> None:
    for name, value, known in (("post", post, POSTS), ("ranking", ranking, RANKINGS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    if groups and (F % k or (post, ranking) != ("relu", "value")):
        raise ValueError(f"groups: expected k={k} to divide F={F}, with post='relu' and ranking='value', got True")


def _variant(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int, post: str, ranking: str, groups: bool
) -> tuple[Tensor, Tensor]:
    parts = []
    for tokens in x.split(TOKENS_AT_ONCE):
        if groups:
            parts.append(reference.encode_groupmax(tokens, W_enc, b_enc, b_dec, k))
        else:
            parts.append(reference.encode_topk(tokens, W_enc, b_enc, b_dec, k, post, ranking))
    values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, indices
