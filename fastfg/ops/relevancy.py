"""``relevancy``: one block's step of the relevancy rows (equations 1 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_identity, check_rows, check_shapes
from fastfg.ops.dispatch import choose, detached, register, torch_op


@register
def _relevancy(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float, gates: Tensor | None, paper: bool
) -> Tensor:
    return rows.new_empty(rows.shape)


@detached
def relevancy(
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dO: Tensor,
    scale: float,
    gates: Tensor | None = None,
    identity: str = "transmm",
    *,
    backend: str = "auto",
) -> Tensor:
    """One block's relevancy step ``r <- r + (r @ E) * w``, with ``E = mean_h max(A * dy/dA, 0)``.

    Args:
        rows: [C, B, N], float32 or float64. The results have this dtype, regardless of the model's.
        q, k, v: [B, H, N, dh] queries, keys and values.
        dO: [B, H, N, dh] gradient of the target at the attention's output.
        scale: factor of the attention logits ``q @ k^T``.
        gates: [C, B, N], 1 for prefix tokens; None for a block that is not gated.
        identity: ``transmm`` (no identity inside E) or ``paper`` (equation 1 taken literally).
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The new rows [C, B, N]. The inputs are not modified.

    Raises:
        ValueError: for shapes that don't fit, rows of another dtype, or an unknown ``identity``.
        BackendError: if the named backend can't run; the message has every reason.

    Source: equations 1 and 6, in the row form (docs/method.md).
    """
    check_identity(identity)
    check_rows(rows)
    shape = "B H N dh"
    check_shapes({}, rows=(rows, "C B N"), q=(q, shape), k=(k, shape), v=(v, shape), dO=(dO, shape))
    if gates is not None and gates.shape != rows.shape:
        raise ValueError(f"gates: expected {list(rows.shape)}, as rows, got {list(gates.shape)}")
    chosen = choose("relevancy", backend, rows.device, q.dtype)  # every backend has float64 rows
    if rows.numel() == 0:
        return torch.empty_like(rows)
    if chosen == "reference":
        return reference.relevancy(rows, q, k, v, dO, scale, gates, identity)
    return torch_op("relevancy", chosen)(rows, q, k, v, dO, scale, gates, identity == "paper")
