"""``gated_relevancy``: ``project``, ``gate`` and ``relevancy`` of one block in one call (equations 1 to 6)."""

from __future__ import annotations

from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_identity, check_indices, check_rows, check_shapes, widest
from fastfg.ops.dispatch import choose, detached, register, torch_op


@register
def _gated_relevancy(
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
    paper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (C, _, _), (B, P, _) = rows.shape, g.shape
    return rows.new_empty(rows.shape), rows.new_empty(B, P), rows.new_empty(C, B, P)


@detached
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
    """One block's relevancy step for C gate configurations that share the block's sparse codes.

    Args:
        rows: [C, B, N], float32 or float64. The results have this dtype, regardless of the model's.
        q, k, v, dO, scale, identity: as in :func:`relevancy`.
        g: [B, P, d] gradient of the target at the patches. They are the last P of the N tokens; the tokens before
            them have gate 1.
        W_dec: [F, d] decoder.
        values: [B, P, K] codes.
        indices: [B, P, K] int64, the features they belong to, from 0 to F - 1.
        kappa: [C].
        c_max: [C]. If it is 1, the configuration does not gate this block: its gates are exactly 1 for any scores.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The new rows [C, B, N], scores [B, P] and gates [C, B, P]. The inputs are not modified.

    Raises:
        ValueError: for shapes that don't fit, rows of another dtype, or an unknown ``identity``.
        IndexError: for an index out of range; see :func:`project` for what a Triton kernel does.
        BackendError: if the named backend can't run; the message has every reason.

    Source: equations 1 to 6.
    """
    check_identity(identity)
    check_rows(rows)
    sizes: dict[str, int] = {}
    shape, codes = "B H N dh", "B P K"
    check_shapes(sizes, rows=(rows, "C B N"), q=(q, shape), k=(k, shape), v=(v, shape), dO=(dO, shape))
    check_shapes(sizes, g=(g, "B P d"), W_dec=(W_dec, "F d"), values=(values, codes), indices=(indices, codes))
    check_shapes(sizes, kappa=(kappa, "C"), c_max=(c_max, "C"))
    C, B, N, P = (sizes[letter] for letter in "CBNP")
    if not min(1, N) <= P <= N:
        raise ValueError(f"g: expected 1 to {N} patches, the last of rows' tokens, got {P}")
    chosen = choose("gated_relevancy", backend, rows.device, widest(rows, q))
    if B == 0 or N == 0:
        return rows.new_empty(C, B, N), rows.new_empty(B, P), rows.new_empty(C, B, P)
    tensors = (rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max)
    if chosen == "reference":
        check_indices(indices, W_dec.shape[0])
        return reference.gated_relevancy(*tensors, identity)
    return torch_op("gated_relevancy", chosen)(*tensors, identity == "paper")
