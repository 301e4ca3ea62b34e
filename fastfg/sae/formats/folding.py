"""Foldings: the weights absorb a factor, the reconstruction stays. They are computed in float64 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH_NORM_EPS = 1e-5


def decoder_norm(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of unit-norm rows, for an SAE that multiplies pre-activations by the norm of their decoder row.

    ``f = act((x @ W_enc + b_enc) * n)`` and ``x_hat = (f / n) @ W_dec + b_dec`` with ``n = |W_dec row|``. A feature
    with a row of zeros stays without effect.
    """
    W_enc, b_enc, W_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec"))
    n = W_dec.double().norm(dim=1)
    rows = W_dec.double() / torch.where(n > 0, n, 1.0)[:, None]
    return weights | {
        "W_enc": (W_enc.double() * n).to(W_enc.dtype),
        "b_enc": (b_enc.double() * n).to(b_enc.dtype),
        "W_dec": rows.to(W_dec.dtype),
    }


def row_factor(W_dec: Tensor, factor: Tensor) -> Tensor:
    """Decoder rows times one factor per feature [F]."""
    return (W_dec.double() * factor.double()[:, None]).to(W_dec.dtype)


def batch_norm(W_enc: Tensor, b_enc: Tensor, norm: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Encoder and bias with a BatchNorm over the features, by its running statistics.

    ``norm``: ``running_mean``, ``running_var`` [F], and ``weight``, ``bias`` [F] if it has them.
    """
    factor = (norm["running_var"].double() + BATCH_NORM_EPS).rsqrt()
    if "weight" in norm:
        factor = factor * norm["weight"].double()
    bias = (b_enc.double() - norm["running_mean"].double()) * factor
    if "bias" in norm:
        bias = bias + norm["bias"].double()
    return (W_enc.double() * factor).to(W_enc.dtype), bias.to(b_enc.dtype)
