"""``encode_topk``: the K largest pre-activations of each token, then ReLU."""

from __future__ import annotations

from torch import Tensor

from fastfg.ops.check import check_shapes
from fastfg.ops.dispatch import run


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sparse codes of a TopK SAE.

    Args:
        x: [T, d], already normalised. W_enc: [d, F]. b_enc: [F]. b_dec: [d], or None where it is not subtracted.
        k: active features a token, 1 to F.

    Returns values [T, K] >= 0 in descending order, and indices [T, K] int64; ties go to the lowest index.
    """
    sizes: dict[str, int] = {}
    check_shapes(sizes, W_enc=(W_enc, "d F"), x=(x, "T d"), b_enc=(b_enc, "F"), b_dec=(b_dec, "d"))
    if not 1 <= k <= sizes["F"]:
        raise ValueError(f"k: expected 1 to {sizes['F']}, got {k}")
    return run("encode_topk", backend, x, W_enc, b_enc, b_dec, k)
