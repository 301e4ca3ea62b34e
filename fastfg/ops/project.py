"""``project``: equations 2 and 3 on the active features."""

from __future__ import annotations

from torch import Tensor

from fastfg.ops.check import check_shapes
from fastfg.ops.dispatch import run


def project(
    g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Scores [T], ``s_t = sum_k c_tk``, and contributions [T, K], ``c_tk = values_tk (W_dec[indices_tk] . g_t)``.

    Args:
        g: [T, d] gradient of the target at the residual stream. W_dec: [F, d].
        values: [T, K] codes. indices: [T, K] int64, the features they belong to.

    Both are of ``g``'s dtype.
    """
    check_shapes({}, g=(g, "T d"), W_dec=(W_dec, "F d"), values=(values, "T K"), indices=(indices, "T K"))
    return run("project", backend, g, W_dec, values, indices)
