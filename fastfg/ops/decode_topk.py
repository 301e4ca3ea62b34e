"""``decode_topk``: the reconstruction of a TopK SAE from its sparse codes."""

from __future__ import annotations

from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_indices, check_shapes
from fastfg.ops.dispatch import choose, detached, register, torch_op


@register
def _decode_topk(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    return W_dec.new_empty(values.shape[0], W_dec.shape[1])


@detached
def decode_topk(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    """``x_hat_t = sum_k values_tk W_dec[indices_tk] + b_dec``, from the active features only.

    Args:
        values: [T, K] codes.
        indices: [T, K] int64, the features they belong to, from 0 to F - 1.
        W_dec: [F, d] decoder.
        b_dec: [d], or None to add nothing. Its dtype may differ from ``W_dec``'s.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The reconstruction [T, d], with ``W_dec``'s dtype.

    Raises:
        ValueError: for shapes that don't fit.
        IndexError: for an index out of range. A Triton kernel can't raise: that token's reconstruction is NaN.
        BackendError: if the named backend can't run; the message has every reason.

    Source: the TopK SAEs of Gao et al. 2024, arXiv 2406.04093.
    """
    shapes = {"W_dec": (W_dec, "F d"), "values": (values, "T K"), "indices": (indices, "T K"), "b_dec": (b_dec, "d")}
    check_shapes({}, **shapes)
    chosen = choose("decode_topk", backend, W_dec.device, W_dec.dtype)
    if chosen == "reference":
        check_indices(indices, W_dec.shape[0])
        return reference.decode_topk(values, indices, W_dec, b_dec)
    return torch_op("decode_topk", chosen)(values, indices, W_dec, b_dec)
