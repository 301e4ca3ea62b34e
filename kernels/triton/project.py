"""``s_t = sum_k f_tk (W_dec[k] . g_t)`` over the K active features of a token, and its terms (equations 2 and 3).

Each program processes one token. It gathers BLOCK_K rows of ``W_dec`` at a time, in tiles of columns, and adds
``W * g`` to a tile of products. After the last columns, one reduction of that tile gives the dot products of all
BLOCK_K rows. Neither ``D^T g`` nor ``f W_dec`` is computed. An index out of range is not read: its term is NaN.

Operations: ``2 T K d``. Bytes: ``T K d`` elements of ``W_dec``, and little else. That is one operation per byte at 16
bits, so memory is the limit, or the cache for rows that tokens share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

# 80 registers leave room for 24 warps per multiprocessor, whose loads hide each other's latency.
HALF = [
    {"BLOCK_K": 16, "BLOCK_D": 256, "num_warps": 4, "maxnreg": 80},
    {"BLOCK_K": 32, "BLOCK_D": 256, "num_warps": 8, "maxnreg": 80},
    {"BLOCK_K": 32, "BLOCK_D": 128, "num_warps": 4, "maxnreg": 96},
    {"BLOCK_K": 8, "BLOCK_D": 1024, "num_warps": 4, "maxnreg": 128},
]
SINGLE = [config | {"BLOCK_K": config["BLOCK_K"] // 2} for config in HALF]  # as many bytes


@triton.jit
def contributions_of(
    g_ptr, W_ptr, values_ptr, indices_ptr, first, K, D, F, g_d, W_s, v_k, i_k,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``f_tk (W_dec[k] . g_t)`` for BLOCK_K features of the token that the pointers start at.

    0 past K, and NaN for an index out of range.
    """
    k = first + tl.arange(0, BLOCK_K)
    index = tl.load(indices_ptr + k * i_k, mask=k < K, other=-1).to(tl.int64)
    known = (index >= 0) & (index < F)
    rows = W_ptr + index[:, None] * W_s[0]
    products = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        g = tl.load(g_ptr + d * g_d, mask=d < D, other=0.0).to(tl.float32)
        W = tl.load(rows + d[None, :] * W_s[1], mask=known[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        products += W * g[None, :]
    value = tl.load(values_ptr + k * v_k, mask=k < K, other=0.0).to(tl.float32)
    return tl.where(known, value * tl.sum(products, 1), tl.where(k < K, float("nan"), 0.0))


@triton.jit
def project_kernel(
    g_ptr, W_ptr, values_ptr, indices_ptr, scores_ptr, contributions_ptr, K, D, F, g_s, W_s, v_s, i_s,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    g_ptr += t * g_s[0]
    values_ptr += t * v_s[0]
    indices_ptr += t * i_s[0]
    score = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        part = contributions_of(
            g_ptr, W_ptr, values_ptr, indices_ptr, first, K, D, F, g_s[1], W_s, v_s[1], i_s[1], BLOCK_K, BLOCK_D
        )
        k = first + tl.arange(0, BLOCK_K)
        tl.store(contributions_ptr + t * K + k, part, mask=k < K)
        score += part
    tl.store(scores_ptr + t, tl.sum(score))


def fitted(config: tuning.Config, K: int, d: int) -> tuning.Config:
    """``config`` with tiles no larger than the data."""
    sizes = {"BLOCK_K": K, "BLOCK_D": d}
    return config | {name: min(config[name], triton.next_power_of_2(max(n, 1))) for name, n in sizes.items()}


def project(
    g: Tensor,  # [T, d]
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
) -> tuple[Tensor, Tensor]:
    """Scores [T] and their terms, the contributions [T, K], both with ``g``'s dtype; sums are in float32.

    For an index outside of [0, F), the contribution and the token's score are NaN.
    """
    (T, K), d = values.shape, g.shape[1]
    scores = torch.empty(T, dtype=g.dtype, device=g.device)
    contributions = torch.empty(T, K, dtype=g.dtype, device=g.device)

    if T == 0:
        return scores, contributions

    def run(config: tuning.Config) -> tuple[Tensor, Tensor]:
        project_kernel[(T,)](
            g_ptr=g,
            W_ptr=W_dec,
            values_ptr=values,
            indices_ptr=indices,
            scores_ptr=scores,
            contributions_ptr=contributions,
            K=K,
            D=d,
            F=W_dec.shape[0],
            g_s=g.stride(),
            W_s=W_dec.stride(),
            v_s=values.stride(),
            i_s=indices.stride(),
            **fitted(config, K, d),
        )
        return scores, contributions

    candidates = SINGLE if W_dec.dtype == torch.float32 else HALF
    return run(tuning.choose("project", W_dec, (T, K, d), candidates, run))
