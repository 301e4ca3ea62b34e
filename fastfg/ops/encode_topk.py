"""``encode_topk``: the K largest pre-activations of each token, then ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_shapes
from fastfg.ops.dispatch import choose, detached, register, torch_op


@register
def _encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


@detached
def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sparse codes of a TopK SAE.

    Args:
        x: [T, d] residual stream, already normalised.
        W_enc: [d, F] encoder, with ``x``'s dtype.
        b_enc: [F]. Its dtype may differ from ``x``'s.
        b_dec: [d], or None for an SAE that does not subtract it. Its dtype may differ from ``x``'s.
        k: active features per token, from 1 to F.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        Values [T, K] >= 0 in descending order, with ``x``'s dtype, and indices [T, K] int64. Of equal values, the one
        with the lowest index is taken first.

    Raises:
        ValueError: for shapes that don't fit, or ``k`` out of range.
        BackendError: if the named backend can't run; the message has every reason.

    Source: the TopK SAEs of Gao et al. 2024, arXiv 2406.04093.
    """
    sizes: dict[str, int] = {}
    check_shapes(sizes, W_enc=(W_enc, "d F"), x=(x, "T d"), b_enc=(b_enc, "F"), b_dec=(b_dec, "d"))
    if isinstance(k, bool):
        raise ValueError(f"k: expected an int, got {k}")
    if not 1 <= k <= sizes["F"]:
        raise ValueError(f"k: expected 1 to {sizes['F']}, got {k}")
    chosen = choose("encode_topk", backend, x.device, x.dtype)
    if chosen == "reference":
        return reference.encode_topk(x, W_enc, b_enc, b_dec, k)
    return torch_op("encode_topk", chosen)(x, W_enc, b_enc, b_dec, k)
