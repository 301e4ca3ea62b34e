"""Equations 1 to 6 for one gated block: the patches' scores, their gates, and the step of the relevancy rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfg.reference.gate import gate
from fastfg.reference.project import project
from fastfg.reference.relevancy import relevancy


def gated_relevancy(
    rows: Tensor,  # [C, B, N]
    q: Tensor,  # [B, H, N, dh]
    k: Tensor,  # [B, H, N, dh]
    v: Tensor,  # [B, H, N, dh]
    dO: Tensor,  # [B, H, N, dh]
    scale: float,
    g: Tensor,  # [B, P, d]
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [B, P, K]
    indices: Tensor,  # [B, P, K]
    kappa: Tensor,  # [C]
    c_max: Tensor,  # [C], 1 for a configuration that does not gate this block
    identity: str = "transmm",
) -> tuple[Tensor, Tensor, Tensor]:
    """The new rows [C, B, N], scores [B, P] and gates [C, B, P], all with the dtype of ``rows``.

    The N - P prefix tokens come first and have gate 1. If ``c_max`` is 1, every patch also has gate 1.
    """
    scores, _ = project(g.flatten(0, 1), W_dec, values.flatten(0, 1), indices.flatten(0, 1))  # eq. 2, 3
    scores = scores.unflatten(0, g.shape[:2]).to(rows.dtype)
    gates = gate(scores, kappa[:, None, None], c_max[:, None, None])  # eq. 4, 5
    gates = gates.masked_fill(c_max[:, None, None] == 1, 1.0)  # even where the score is NaN
    all_gates = F.pad(gates, (rows.shape[-1] - gates.shape[-1], 0), value=1.0)
    return relevancy(rows, q, k, v, dO, scale, all_gates, identity), scores, gates  # eq. 1, 6
