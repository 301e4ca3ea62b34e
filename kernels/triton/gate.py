"""A robust z-score of the patches' scores becomes a multiplier in [1/c_max, c_max] (equations 4 and 5).

``m = median(s)``, ``mad = median(|s - m|) + 1e-8``, ``z = (s - m) / (1.4826 mad)``,
``w = exp(log(c_max) tanh(kappa z))``, the median being the LOWER one for an even number of patches. One program a
row. The median is exact: numbers map to integers of the same order, and the wanted one is built from its highest
bit down, by counting at each bit how many lie below.

Operations: ``2 x 32`` comparisons and some 20 operations for each of the R P scores of R rows. Bytes: each score
once in, each gate once out. Either is nothing: what counts is the one launch, in place of twelve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAD_EPS = tl.constexpr(1e-8)
MAD_TO_STD = tl.constexpr(1.4826)  # of a normal distribution


@triton.jit
def kth_smallest(x, inside, rank):
    """The ``rank``-th smallest (from 0) of the float32 numbers ``x`` that are ``inside``."""
    bits = x.to(tl.uint32, bitcast=True)
    negative = bits >> 31 == 1
    key = bits ^ tl.where(negative, 0xFFFFFFFF, 0x80000000)  # of the same order as x
    answer = tl.full([], 0, tl.uint32)
    for step in range(32):
        trial = answer | (tl.full([], 1, tl.uint32) << (31 - step))
        below = tl.sum((inside & (key < trial)).to(tl.int32))
        answer = tl.where(below <= rank, trial, answer)
    bits = answer ^ tl.where(answer >> 31 == 1, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def median_and_scale(s, inside, P):
    """``m`` and ``1.4826 mad`` of the ``P`` numbers ``s`` that are ``inside``; NaN where one is: it has no order."""
    rank = (P - 1) // 2
    m = kth_smallest(s, inside, rank)
    deviation = tl.abs(s - m)
    mad = kth_smallest(deviation, inside, rank) + MAD_EPS
    unknown = tl.max((inside & (deviation != deviation)).to(tl.int32)) > 0
    return m, tl.where(unknown, float("nan"), MAD_TO_STD * mad)


@triton.jit
def multiplier(s, m, scale, kappa, c_max):
    z = (s - m) / scale  # eq. 4
    tanh = 1 - 2 / (tl.exp(2 * kappa * z) + 1)
    return tl.exp(tl.log(c_max) * tanh)  # eq. 5


@triton.jit
def gate_kernel(scores_ptr, kappa_ptr, c_max_ptr, out_ptr, P, BLOCK_P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    s = tl.load(scores_ptr + row * P + p, mask=p < P, other=0.0).to(tl.float32)
    kappa = tl.load(kappa_ptr + row).to(tl.float32)
    c_max = tl.load(c_max_ptr + row).to(tl.float32)
    m, scale = median_and_scale(s, p < P, P)
    tl.store(out_ptr + row * P + p, multiplier(s, m, scale, kappa, c_max), mask=p < P)


def one_a_row(number: float | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """``number``, or a tensor that broadcasts against ``shape`` [..., 1], as a flat float32 tensor."""
    if not isinstance(number, Tensor):
        return torch.full(shape, number, dtype=torch.float32, device=device).reshape(-1)
    return number.to(device, torch.float32).expand(shape).reshape(-1).contiguous()  # it may be one number, expanded


def gate(scores: Tensor, kappa: float | Tensor, c_max: float | Tensor) -> Tensor:
    """Gates [..., P] of ``scores`` [..., P], of their dtype; computed in float32.

    ``kappa`` and ``c_max`` are numbers, or tensors that broadcast against [..., 1] (several configurations at once).
    """
    P = scores.shape[-1]
    tensors = [n.shape for n in (kappa, c_max) if isinstance(n, Tensor)]
    shape = torch.broadcast_shapes((*scores.shape[:-1], 1), *tensors)
    flat = scores.expand(*shape[:-1], P).contiguous()
    out = torch.empty_like(flat)
    if out.numel():
        BLOCK_P = triton.next_power_of_2(P)
        parameters = (one_a_row(kappa, shape, scores.device), one_a_row(c_max, shape, scores.device))
        num_warps = max(1, min(8, BLOCK_P // 256))
        gate_kernel[(out.numel() // P,)](flat, *parameters, out, P, BLOCK_P=BLOCK_P, num_warps=num_warps)
    return out
