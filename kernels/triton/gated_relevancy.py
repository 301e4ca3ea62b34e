"""``project``, ``gate`` and ``relevancy`` of one gated block in one launch: equations 1 to 6.

The launch holds two kinds of programs for each image: those that gather decoder rows, bound by bytes, and those that
make tiles of the flow, bound by the matrix unit, so that the two overlap on a multiprocessor. Each adds one to its
image's counter when its results are written; the last one to do so finds all of them there, makes the image's gates
and applies them, for all C rows. No program waits for another, so none can block one. Which is the last changes
from run to run; what it computes does not, for all sums have a fixed order.

Operations: ``4 B H N^2 dh`` of the flow and ``2 B P K d`` of the projection (the log-sum-exp, a launch before,
``2 B H N^2 dh``). Bytes: ``B P K d`` elements of ``W_dec``, ``4 B H N dh`` of q, k, v and dO, and the partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gate import median_and_scale, multiplier
from .project import contributions_of
from .relevancy import (
    check_identity,
    flow_tile,
    head_width,
    log_sum_exp,
    rows_precision,
    step,
    sum_splits,
    tiling,
)

COLUMNS = 256  # of the decoder at a time, of BLOCK_K of its rows

# As relevancy's, but small: several programs a multiprocessor hide the latency of the gathers, which take the longest.
EXACT = [{"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 255}]
ONE_ROW = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "cards": (9,)},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2, "cards": (8, 9)},
]
ROWS = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "cards": (9,)},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "cards": (9, 10)},
]


@triton.jit
def arrives_last(count_ptr, expected):
    """Whether this program is the last of ``expected`` to come here; it then sees what all of them wrote before."""
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    return tl.atomic_add(count_ptr, 1, sem="acq_rel") == expected - 1


@triton.jit
def score_patch(
    g_ptr, W_ptr, values_ptr, indices_ptr, scores_ptr, P, K, D, g_s, W_s, f_s, i_s, b, p,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    g_ptr += b * g_s[0] + p * g_s[1]
    values_ptr += b * f_s[0] + p * f_s[1]
    indices_ptr += b * i_s[0] + p * i_s[1]
    score = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        score += contributions_of(
            g_ptr, W_ptr, values_ptr, indices_ptr, first, K, D, g_s[2], W_s, f_s[2], i_s[2], BLOCK_K, BLOCK_F
        )
    tl.store(scores_ptr + b * P + p, tl.sum(score))


@triton.jit
def finish(
    scores_ptr, kappa_ptr, c_max_ptr, rows_ptr, flow_ptr, gates_ptr, out_ptr, C, B, H, N, P, splits, r_s, b,
    IDENTITY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_STEP: tl.constexpr,
):  # fmt: skip
    """Image ``b``'s gates and new rows. What other programs wrote is read past the L1 cache (.cg), which may be old."""
    scores_ptr += b * P
    every = tl.arange(0, BLOCK_P)
    scores = tl.load(scores_ptr + every, mask=every < P, other=0.0, cache_modifier=".cg").to(tl.float32)
    m, scale = median_and_scale(scores, every < P, P)
    for c in range(C):
        kappa, c_max = tl.load(kappa_ptr + c), tl.load(c_max_ptr + c)
        row = c * B + b
        for start in range(0, N, BLOCK_STEP):
            n = start + tl.arange(0, BLOCK_STEP)
            p = n - (N - P)
            patch = (p >= 0) & (n < N)
            s = tl.load(scores_ptr + p, mask=patch, other=0.0, cache_modifier=".cg").to(tl.float32)
            w = tl.where(c_max == 1, 1.0, multiplier(s, m, scale, kappa, c_max))  # 1 exactly, whatever the scores
            tl.store(gates_ptr + row * P + p, w, mask=patch)
            rows = tl.load(rows_ptr + c * r_s[0] + b * r_s[1] + n * r_s[2], mask=n < N).to(tl.float32)
            flow = sum_splits(flow_ptr + row * N + n, C * B * N, splits, n < N)
            tl.store(out_ptr + row * N + n, step(rows, flow, tl.where(patch, w, 1.0), H, IDENTITY), mask=n < N)


@triton.jit
def gated_relevancy_kernel(
    q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, g_ptr, W_ptr, values_ptr, indices_ptr, kappa_ptr, c_max_ptr,
    flow_ptr, scores_ptr, gates_ptr, out_ptr, count_ptr, scale, C, B, H, N, DH, P, K, D, key_tiles, splits, heads,
    q_s, k_s, v_s, o_s, r_s, g_s, W_s, f_s, i_s, IDENTITY: tl.constexpr, ROWS_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_STEP: tl.constexpr,
):  # fmt: skip
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0) - P
    if program < tiles:  # the longer ones first
        m = program % key_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        split, c_tile = program // key_tiles % splits, program // key_tiles // splits
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        flow = flow_tile(
            q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, scale, C, H, N, DH, q_s, k_s, v_s, o_s, r_s,
            b, c, m, split * heads, min(split * heads + heads, H), ROWS_PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        at = ((split.to(tl.int64) * C + c[None, :]) * B + b) * N + m[:, None]
        tl.store(flow_ptr + at, flow, mask=(m < N)[:, None] & (c < C)[None, :])
    else:
        score_patch(
            g_ptr, W_ptr, values_ptr, indices_ptr, scores_ptr, P, K, D, g_s, W_s, f_s, i_s, b, program - tiles,
            BLOCK_K, BLOCK_F,
        )  # fmt: skip
    if arrives_last(count_ptr + b, tl.num_programs(0)):
        finish(
            scores_ptr, kappa_ptr, c_max_ptr, rows_ptr, flow_ptr, gates_ptr, out_ptr, C, B, H, N, P, splits, r_s, b,
            IDENTITY, BLOCK_P, BLOCK_STEP,
        )  # fmt: skip


def gated_relevancy(
    rows: Tensor,  # [C, B, N]
    q: Tensor,  # [B, H, N, dh]
    k: Tensor,  # [B, H, N, dh]
    v: Tensor,  # [B, H, N, dh]
    dO: Tensor,  # [B, H, N, dh]
    scale: float,
    g: Tensor,  # [B, P, d], the last P of the N tokens; those before have gate 1
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [B, P, K]
    indices: Tensor,  # [B, P, K]
    kappa: Tensor,  # [C]
    c_max: Tensor,  # [C], 1 for a configuration that does not gate
    identity: str = "transmm",
    *,
    lse: Tensor | None = None,  # [B, H, N], natural log-sum-exp of each query's logits, where the model kept it
) -> tuple[Tensor, Tensor, Tensor]:
    """New rows [C, B, N], scores [B, P] and gates [C, B, P], of ``rows``' dtype; sums are in float32."""
    check_identity(identity)
    (C, B, N), (_, H, _, dh), (_, P, K), d = rows.shape, q.shape, values.shape, g.shape[-1]
    if not 0 < P <= N:
        raise ValueError(f"values: expected [B, P, K] with P from 1 to {N}, the tokens, got {list(values.shape)}")
    out, scores, gates = (
        torch.empty(shape, dtype=rows.dtype, device=rows.device) for shape in ((C, B, N), (B, P), (C, B, P))
    )
    if B == 0:
        return out, scores, gates
    lse = log_sum_exp(q, k, scale) if lse is None else lse.float().contiguous()
    kappa, c_max = (t.to(rows.device, torch.float32).contiguous() for t in (kappa, c_max))
    inputs = (q, k, v, dO, lse, rows, g, W_dec, values, indices, kappa, c_max)
    strides = [t.stride() for t in (q, k, v, dO, rows, g, W_dec, values, indices)]
    constants = {
        "IDENTITY": identity == "paper",
        "ROWS_PRECISION": rows_precision(q.dtype),
        "BLOCK_D": head_width(dh),
        "BLOCK_F": COLUMNS,
        "BLOCK_P": triton.next_power_of_2(P),
        "BLOCK_STEP": min(1024, triton.next_power_of_2(N)),
    }

    def run(config: tuning.Config) -> tuple[Tensor, Tensor, Tensor]:
        BLOCK_C, key_tiles, row_tiles, splits, heads = tiling(C, B, H, N, config["BLOCK_M"])
        flow = torch.empty(splits, C, B, N, dtype=torch.float32, device=rows.device)
        count = torch.zeros(B, dtype=torch.int32, device=rows.device)
        gated_relevancy_kernel[(key_tiles * row_tiles * splits + P, B)](
            *inputs, flow, scores, gates, out, count, scale, C, B, H, N, dh, P, K, d, key_tiles, splits, heads,
            *strides, BLOCK_C=BLOCK_C, **constants, **config,
        )  # fmt: skip
        return out, scores, gates

    kind, half = ("gated_relevancy, one row", ONE_ROW) if C == 1 else ("gated_relevancy", ROWS)
    candidates = EXACT if q.dtype == torch.float32 else half
    return run(tuning.choose(kind, q, (C, *q.shape, K, d), candidates, run))
