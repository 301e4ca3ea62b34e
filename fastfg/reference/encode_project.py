"""Equations 2 and 3 for SAEs of any sparsity, in chunks of features: no array [T, F] is stored."""

from __future__ import annotations

from torch import Tensor

from fastfg.reference.encode import ALL_AT_ONCE, Activation, encode, widened
from fastfg.reference.project import project_dense

FEATURES_AT_ONCE = 4096


def encode_project(
    x: Tensor,  # [T, d], already normalised, b_dec already subtracted
    g: Tensor,  # [T, d]
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    W_dec: Tensor,  # [F, d]
    activation: Activation,
) -> Tensor:
    """Scores [T] of an SAE with any activation but those of ``ALL_AT_ONCE``, which need all features at once."""
    if activation.name in ALL_AT_ONCE:
        raise ValueError(
            f"activation: expected one that acts on each feature alone, got {activation.name!r} (use encode_topk)"
        )
    scores = widened(x).new_zeros(x.shape[0])
    for start in range(0, W_enc.shape[1], FEATURES_AT_ONCE):
        part = slice(start, start + FEATURES_AT_ONCE)
        f = encode(x, W_enc[:, part], b_enc[part], None, activation.slice(part.start, part.stop))
        scores = scores + project_dense(g, W_dec[part], f)
    return scores.to(x.dtype)
