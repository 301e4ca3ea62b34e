"""Equations 2 and 3: a token's score is the sum of its features' codes times their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2**22  # entries of gathered decoder rows at a time, 16 MiB in float32


def project_dense(g: Tensor, W_dec: Tensor, f: Tensor) -> Tensor:
    """``s_t = sum_k (D^T g_t)_k f_tk`` [...] as in the paper: ``g`` is [..., d], ``W_dec`` [F, d], ``f`` [..., F]."""
    feature_gradient = g @ W_dec.to(g.dtype).mT  # eq. 2
    return (feature_gradient * f).sum(-1)  # eq. 3


def project(
    g: Tensor,  # [T, d]
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
) -> tuple[Tensor, Tensor]:
    """Scores [T] from the active features only, and the terms [T, K] that they sum. ``D^T g`` is never computed.

    Tokens are processed in chunks, so that the decoder rows [T, K, d] are never all in memory.
    """
    tokens = max(1, TILE // max(1, values.shape[1] * g.shape[1]))
    parts = zip(g.split(tokens), values.split(tokens), indices.split(tokens), strict=True)
    terms = torch.cat([contributions(g, W_dec, values, indices) for g, values, indices in parts])
    return terms.sum(-1), terms  # eq. 3


def contributions(g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The terms ``f_tk (W_dec[k] . g_t)`` of eq. 3 [T, K], in the order of ``indices``."""
    rows = F.embedding(indices, W_dec).to(g.dtype)
    feature_gradient = (rows @ g.unsqueeze(-1)).squeeze(-1)  # eq. 2, at the active features
    return values.to(g.dtype) * feature_gradient
