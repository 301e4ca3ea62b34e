"""Equations 4 and 5: a robust z-score of the patches' scores becomes a multiplier in [1/c_max, c_max]."""

from __future__ import annotations

import torch
from torch import Tensor

MAD_EPS = 1e-8
MAD_TO_STD = 1.4826  # for a normal distribution


def gate(scores: Tensor, kappa: float | Tensor, c_max: float | Tensor) -> Tensor:
    """Gates [..., P] from ``scores`` [..., P]; the last dimension has the patches of one image and block.

    The median of an even number of patches is the lower one, as in torch. ``kappa`` and ``c_max`` are numbers, or
    tensors that broadcast against [..., 1], for several configurations at once. The computation uses at least float32,
    because MAD_EPS is 0 in float16.
    """
    s = scores.to(torch.promote_types(scores.dtype, torch.float32))
    kappa, c_max = (torch.as_tensor(number, dtype=s.dtype, device=s.device) for number in (kappa, c_max))
    w = torch.exp(c_max.log() * torch.tanh(kappa * z_score(s)))  # eq. 5
    return w.to(scores.dtype)


def z_score(s: Tensor) -> Tensor:
    """Robust z-scores [..., P] of the patches' scores ``s`` [..., P], in the dtype of ``s``: float32 or float64.

    >>> z_score(torch.tensor([4.0, 1.0, 2.0, 9.0]))  # lower median 2, lower median of the deviations 1
    tensor([ 1.3490, -0.6745,  0.0000,  4.7214])
    """
    m = lower_median(s)
    mad = lower_median((s - m).abs()) + MAD_EPS  # eq. 4
    return (s - m) / (MAD_TO_STD * mad)


def lower_median(x: Tensor) -> Tensor:
    """The lower median of the last dimension [..., 1]; NaN if a number is NaN.

    ``Tensor.median`` gives the same, but on a GPU torch refuses it where only deterministic algorithms are allowed.
    """
    middle = x.sort(-1).values[..., (x.shape[-1] - 1) // 2].unsqueeze(-1)
    return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, middle)
