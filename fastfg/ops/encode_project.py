"""``encode_project``: codes and scores in one go, for SAEs of any sparsity."""

from __future__ import annotations

from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_shapes
from fastfg.ops.dispatch import run


def encode_project(
    x: Tensor,
    g: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    activation: reference.Activation,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scores [T] of a relu, tanh_relu, jumprelu, gated or batch_topk SAE; no array [T, F] is kept.

    Args:
        x: [T, d], already normalised, ``b_dec`` already subtracted where the SAE does so. g: [T, d].
        W_enc: [d, F]. b_enc: [F]. W_dec: [F, d]. activation: any but ``topk``.
    """
    check_shapes({}, W_enc=(W_enc, "d F"), x=(x, "T d"), g=(g, "T d"), b_enc=(b_enc, "F"), W_dec=(W_dec, "F d"))
    return run("encode_project", backend, x, g, W_enc, b_enc, W_dec, activation)
