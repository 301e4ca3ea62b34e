"""The reconstruction of a TopK SAE from its sparse codes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def decode_topk(
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d], or None: not added
) -> Tensor:
    """``x_hat_t = sum_k values_tk W_dec[indices_tk] + b_dec`` [T, d]. The rows [T, K, d] are never in memory."""
    if indices.numel() == 0:
        decoded = W_dec.new_zeros(len(indices), W_dec.shape[1])
    else:
        decoded = F.embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")
    return decoded if b_dec is None else (decoded + b_dec).to(W_dec.dtype)
