"""Equations 2 and 3: how much each token's active features, times their gradients, speak for the target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def project_dense(g: Tensor, W_dec: Tensor, f: Tensor) -> Tensor:
    """``s_t = sum_k (D^T g_t)_k f_tk`` as it is written: ``g`` [..., d], ``W_dec`` [F, d], ``f`` [..., F] -> [...]."""
    feature_gradient = g @ W_dec.mT  # eq. 2
    return (feature_gradient * f).sum(-1)  # eq. 3


def project(
    g: Tensor,  # [T, d]
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
) -> Tensor:
    """The same on the active features alone: ``s_t = g_t . (f_t W_dec)`` -> [T]. ``D^T g`` is never formed."""
    decoded = F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")  # f_t W_dec, [T, d]
    return (g * decoded).sum(-1)


def contributions(g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The terms of eq. 3 one by one: ``f_tk (W_dec[k] . g_t)`` [T, K], in the order of ``indices``."""
    return values * (W_dec[indices] @ g.unsqueeze(-1)).squeeze(-1)
