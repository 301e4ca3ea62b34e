"""``s_t = sum_k f_tk (W_dec[k] . g_t)`` over the K active features of a token (equations 2 and 3).

One program a token: it gathers the K rows of ``W_dec`` in tiles of some features by some columns and adds
``f * W * g`` into a tile that is summed once, at the end. Neither ``D^T g`` nor ``f W_dec`` is formed.

Operations: ``3 T K d``. Bytes: the gathered rows, ``T K d`` elements of ``W_dec``, and little else: about one
operation a byte, so the memory (or, for rows that tokens share, its cache) sets the pace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEATURES, COLUMNS = 16, 256  # of a tile: 64 numbers a thread


@triton.jit
def project_kernel(
    g_ptr, W_ptr, values_ptr, indices_ptr, out_ptr, K, D,
    g_t, g_d, W_f, W_d, v_t, v_k, i_t, i_k,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        g = tl.load(g_ptr + t * g_t + d * g_d, mask=d < D, other=0.0).to(tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            active = k < K
            index = tl.load(indices_ptr + t * i_t + k * i_k, mask=active, other=0).to(tl.int64)
            value = tl.load(values_ptr + t * v_t + k * v_k, mask=active, other=0.0).to(tl.float32)
            at = W_ptr + index[:, None] * W_f + d[None, :] * W_d
            W = tl.load(at, mask=active[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            total += value[:, None] * (W * g[None, :])
    tl.store(out_ptr + t, tl.sum(total))


def project(
    g: Tensor,  # [T, d]
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
) -> Tensor:
    """Scores [T], of ``g``'s dtype; sums are in float32."""
    (T, K), d = values.shape, g.shape[1]
    out = torch.empty(T, dtype=g.dtype, device=g.device)
    if T:
        block = {
            "BLOCK_K": min(FEATURES, triton.next_power_of_2(max(K, 1))),
            "BLOCK_D": min(COLUMNS, triton.next_power_of_2(max(d, 1))),
        }
        strides = (*g.stride(), *W_dec.stride(), *values.stride(), *indices.stride())
        project_kernel[(T,)](g, W_dec, values, indices, out, K, d, *strides, **block, num_warps=4, num_stages=3)
    return out
