"""``relevancy``: equations 1 and 6, one block of the row form."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg.ops.check import check_identity, check_shapes
from fastfg.ops.dispatch import run


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
    """One block's step ``r <- r + (r @ E) * w`` with ``E = mean_h max(A * dy/dA, 0)``.

    Args:
        rows: [C, B, N], float32 or float64; their precision is the result's, whatever the model's.
        q, k, v, dO: [B, H, N, dh]; dO is the gradient at the attention's output.
        scale: of the attention's logits. gates: [C, B, N], 1 for prefix tokens, or None.
        identity: ``transmm`` (no identity inside E) or ``paper`` (eq. 1 by the letter).

    Returns the new rows [C, B, N]; the inputs are left as they are.
    """
    check_identity(identity)
    shape = "B H N dh"
    check_shapes({}, rows=(rows, "C B N"), q=(q, shape), k=(k, shape), v=(v, shape), dO=(dO, shape))
    if gates is not None and gates.shape != rows.shape:
        raise ValueError(f"gates: expected {list(rows.shape)}, as rows, got {list(gates.shape)}")
    return run("relevancy", backend, rows, q, k, v, dO, scale, gates, identity, like=widest(rows, q))


def widest(rows: Tensor, q: Tensor) -> Tensor:
    """The one that asks more of a backend: rows may be of a higher precision than the model.

    Raises ValueError where rows are not precise enough to be summed through the blocks.
    """
    if rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rows: expected float32 or float64, whatever the model's dtype, got {rows.dtype}")
    return rows if rows.dtype == torch.float64 else q
