"""Equations 4 and 5: a robust z-score of the patches' scores becomes a multiplier in [1/c_max, c_max]."""

from __future__ import annotations

import torch
from torch import Tensor

MAD_EPS = 1e-8
MAD_TO_STD = 1.4826  # of a normal distribution


def gate(scores: Tensor, kappa: float | Tensor, c_max: float | Tensor) -> Tensor:
    """Gates [..., P] of ``scores`` [..., P], per image and layer.

    The median is the LOWER one for even ``P`` (torch's). ``kappa`` and ``c_max`` are numbers, or tensors that
    broadcast against [..., 1] (several configurations at once).
    """
    c_max = torch.as_tensor(c_max, dtype=scores.dtype, device=scores.device)
    m = scores.median(-1, keepdim=True).values
    mad = (scores - m).abs().median(-1, keepdim=True).values + MAD_EPS  # eq. 4
    z = (scores - m) / (MAD_TO_STD * mad)
    return torch.exp(c_max.log() * torch.tanh(kappa * z))  # eq. 5
