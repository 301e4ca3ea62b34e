"""``x_hat_t = sum_k f_tk W_dec[k] + b_dec`` over the K active features of a token.

Each program computes one tile of columns of one token: it gathers BLOCK_K rows of ``W_dec`` at a time and adds them
up. An index out of range is not read: the token's reconstruction is NaN.

Operations: ``2 T K d``. Bytes: ``T K d`` elements of ``W_dec``, and little else, as for ``project``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

HALF = [
    {"BLOCK_K": 16, "BLOCK_D": 256, "num_warps": 4},
    {"BLOCK_K": 8, "BLOCK_D": 512, "num_warps": 4},
    {"BLOCK_K": 32, "BLOCK_D": 128, "num_warps": 4},
]
SINGLE = [config | {"BLOCK_K": config["BLOCK_K"] // 2} for config in HALF]  # as many bytes


@triton.jit
def decode_topk_kernel(
    values_ptr, indices_ptr, W_ptr, b_ptr, out_ptr, K, D, F, v_s, i_s, W_s, b_s,
    BIAS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    values_ptr += t * v_s[0]
    indices_ptr += t * i_s[0]
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        index = tl.load(indices_ptr + k * i_s[1], mask=k < K, other=-1).to(tl.int64)
        value = tl.load(values_ptr + k * v_s[1], mask=k < K, other=0.0).to(tl.float32)
        known = (index >= 0) & (index < F)
        at = W_ptr + index[:, None] * W_s[0] + d[None, :] * W_s[1]
        W = tl.load(at, mask=known[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        sums += value[:, None] * W
        sums += tl.where(known | (k >= K), 0.0, float("nan"))[:, None]
    decoded = tl.sum(sums, 0)
    if BIAS:
        decoded += tl.load(b_ptr + d * b_s[0], mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d, decoded, mask=d < D)


def decode_topk(
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d], None: not added
) -> Tensor:
    """The reconstruction [T, d] with ``W_dec``'s dtype; sums are in float32. NaN for an index outside of [0, F)."""
    (T, K), (F, d) = values.shape, W_dec.shape
    result = torch.empty(T, d, dtype=W_dec.dtype, device=W_dec.device)
    if result.numel() == 0:
        return result
    bias = W_dec[0] if b_dec is None else b_dec

    def run(config: tuning.Config) -> Tensor:
        tile = min(config["BLOCK_D"], triton.next_power_of_2(d))
        decode_topk_kernel[(T, triton.cdiv(d, tile))](
            values_ptr=values,
            indices_ptr=indices,
            W_ptr=W_dec,
            b_ptr=bias,
            out_ptr=result,
            K=K,
            D=d,
            F=F,
            v_s=values.stride(),
            i_s=indices.stride(),
            W_s=W_dec.stride(),
            b_s=bias.stride(),
            BIAS=b_dec is not None,
            **config | {"BLOCK_D": tile, "BLOCK_K": min(config["BLOCK_K"], triton.next_power_of_2(max(K, 1)))},
        )
        return result

    return run(tuning.choose("decode_topk", W_dec, (T, K, d), SINGLE if W_dec.dtype == torch.float32 else HALF, run))
