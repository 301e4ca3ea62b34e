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
    m = s.median(-1, keepdim=True).values
    mad = (s - m).abs().median(-1, keepdim=True).values + MAD_EPS  # eq. 4
    z = (s - m) / (MAD_TO_STD * mad)
    w = torch.exp(c_max.log() * torch.tanh(kappa * z))  # eq. 5
    return w.to(scores.dtype)
