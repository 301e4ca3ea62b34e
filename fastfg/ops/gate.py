"""``gate``: a robust z-score of the patches' scores becomes a multiplier (equations 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg import reference
from fastfg.ops.dispatch import choose, detached, register, torch_op


@register
def _gate(scores: Tensor, kappa: Tensor, c_max: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


@detached
def gate(scores: Tensor, kappa: float | Tensor, c_max: float | Tensor, *, backend: str = "auto") -> Tensor:
    """Gates of the patches, computed per image.

    Args:
        scores: [..., P] scores of the patches of one block, at least one patch.
        kappa, c_max: numbers, or tensors that broadcast against [..., 1], for several configurations at once.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        Gates in [1/c_max, c_max], with the dtype of ``scores``: [..., P], where ``...`` is broadcast with ``kappa``
        and ``c_max``. If an image has a NaN score, all its gates are NaN.

    Raises:
        ValueError: for scores without a patch.
        BackendError: if the named backend can't run; the message has every reason.

    Source: equations 4 and 5.
    """
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores: expected [..., P] with at least one patch, got {list(scores.shape)}")
    chosen = choose("gate", backend, scores.device, scores.dtype)
    if chosen == "reference":
        return reference.gate(scores, kappa, c_max)
    rows, kappas, c_maxes = as_rows(scores, kappa, c_max)
    gates = torch_op("gate", chosen)(rows.reshape(-1, rows.shape[-1]), kappas.reshape(-1), c_maxes.reshape(-1))
    return gates.reshape(rows.shape).to(scores.dtype)


def as_rows(scores: Tensor, *numbers: float | Tensor) -> tuple[Tensor, ...]:
    """``scores`` [..., P] and each number [..., 1], all broadcast against each other, in float32 at least."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    tensors = [n.to(wide) if isinstance(n, Tensor) else wide.new_full((1,), n) for n in numbers]
    one, *tensors = torch.broadcast_tensors(wide.narrow(-1, 0, 1), *tensors)
    return wide.expand(*one.shape[:-1], -1), *tensors
