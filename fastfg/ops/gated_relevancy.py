"""``gated_relevancy``: equations 2 to 6, one gated block in one call."""

from __future__ import annotations

from torch import Tensor

from fastfg.ops.check import check_identity, check_shapes
from fastfg.ops.dispatch import run
from fastfg.ops.relevancy import widest


def gated_relevancy(
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dO: Tensor,
    scale: float,
    g: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
    kappa: Tensor,
    c_max: Tensor,
    identity: str = "transmm",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``project``, ``gate`` and ``relevancy`` of one block whose SAE has sparse codes, for C gate configurations.

    Args:
        rows: [C, B, N], float32 or float64; their precision is the results', whatever the model's.
        q, k, v, dO, scale, identity: as in :func:`relevancy`.
        g: [B, P, d] gradient of the target at the patches, the last P of the N tokens; the others have gate 1.
        W_dec: [F, d]. values: [B, P, K] codes. indices: [B, P, K] int64, the features they belong to.
        kappa, c_max: [C]. ``c_max`` is 1 where a configuration does not gate this block: its gates are exactly 1.

    Returns the new rows [C, B, N], scores [B, P] and gates [C, B, P]; the inputs are left as they are.
    """
    check_identity(identity)
    sizes: dict[str, int] = {}
    shape, codes = "B H N dh", "B P K"
    check_shapes(sizes, rows=(rows, "C B N"), q=(q, shape), k=(k, shape), v=(v, shape), dO=(dO, shape))
    check_shapes(sizes, g=(g, "B P d"), W_dec=(W_dec, "F d"), values=(values, codes), indices=(indices, codes))
    check_shapes(sizes, kappa=(kappa, "C"), c_max=(c_max, "C"))
    if not 1 <= sizes["P"] <= sizes["N"]:
        raise ValueError(f"g: expected 1 to {sizes['N']} patches, the last of rows' tokens, got {sizes['P']}")
    arguments = (rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max, identity)
    return run("gated_relevancy", backend, *arguments, like=widest(rows, q))
