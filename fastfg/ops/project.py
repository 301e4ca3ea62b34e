"""``project``: scores of sparse codes, computed from the active features only (equations 2 and 3)."""

from __future__ import annotations

from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_indices, check_shapes
from fastfg.ops.dispatch import choose, detached, register, torch_op


@register
def _project(g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape[0]), g.new_empty(values.shape)


@detached
def project(
    g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Scores ``s_t = sum_k c_tk`` and their contributions ``c_tk = values_tk (W_dec[indices_tk] . g_t)``.

    Args:
        g: [T, d] gradient of the target at the residual stream.
        W_dec: [F, d] decoder, with ``g``'s dtype.
        values: [T, K] codes.
        indices: [T, K] int64, the features they belong to, from 0 to F - 1.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        Scores [T] and contributions [T, K], both with ``g``'s dtype.

    Raises:
        ValueError: for shapes that don't fit.
        IndexError: for an index out of range. A Triton kernel can't raise: it returns NaN as the contribution of that
            index and as the token's score.
        BackendError: if the named backend can't run; the message has every reason.

    Source: equations 2 and 3.
    """
    check_shapes({}, g=(g, "T d"), W_dec=(W_dec, "F d"), values=(values, "T K"), indices=(indices, "T K"))
    chosen = choose("project", backend, g.device, g.dtype)
    if chosen == "reference":
        check_indices(indices, W_dec.shape[0])
        return reference.project(g, W_dec, values, indices)
    return torch_op("project", chosen)(g, W_dec, values, indices)
