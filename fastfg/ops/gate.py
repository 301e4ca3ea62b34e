"""``gate``: equations 4 and 5."""

from __future__ import annotations

from torch import Tensor

from fastfg.ops.dispatch import run


def gate(scores: Tensor, kappa: float | Tensor, c_max: float | Tensor, *, backend: str = "auto") -> Tensor:
    """Gates of scores [..., P], over the patches of one image and layer; in [1/c_max, c_max], of scores' dtype.

    ``kappa`` and ``c_max``: numbers, or tensors that broadcast against [..., 1] (one gate for each of several pairs).
    """
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores: expected [..., P] with at least one patch, got {list(scores.shape)}")
    return run("gate", backend, scores, kappa, c_max)
