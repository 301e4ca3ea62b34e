"""``relevancy``: equations 1 and 6, one block of the row form."""

from __future__ import annotations

from torch import Tensor

from fastfg.dispatch import implementation
from fastfg.ops.check import check_shapes


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
    if identity not in ("transmm", "paper"):
        raise ValueError(f"identity: expected 'transmm' or 'paper', got {identity!r}")
    shape = "B H N dh"
    check_shapes({}, rows=(rows, "C B N"), q=(q, shape), k=(k, shape), v=(v, shape), dO=(dO, shape))
    if gates is not None and gates.shape != rows.shape:
        raise ValueError(f"gates: expected {list(rows.shape)}, as rows, got {list(gates.shape)}")
    return implementation("relevancy", backend, q)(rows, q, k, v, dO, scale, gates, identity)
