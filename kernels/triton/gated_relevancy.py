"""``project``, ``gate`` and ``relevancy`` of one gated block in one launch: equations 1 to 6.

There are two kinds of programs per image. Programs that gather decoder rows are bound by memory, and programs that
compute tiles of the flow are bound by the matrix unit, so the two overlap on a multiprocessor. Each program adds one to
its image's counter after it has written its results. The last one finds all results in memory, computes the image's
gates and applies them to all C rows. No program waits for another, so there is no deadlock. Which program is the last
varies from run to run, but the result does not, because all sums have a fixed order.

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
    flow_arguments,
    flow_tile,
    log_sum_exp,
    step,
    sum_splits,
    tiling,
)

COLUMNS = 256  # of the decoder at a time, for BLOCK_K of its rows

# Like relevancy's, but small: several programs per multiprocessor hide the latency of the gathers.
EXACT = [{"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 255}]
ONE_ROW = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3, "cards": (9,)},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2, "cards": (8,)},
]
ROWS = [
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "cards": (9,)},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "cards": (9,)},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2, "cards": (8, 10)},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "cards": (10,)},
]


@triton.jit
def arrives_last(count_ptr, expected):
    """Whether this is the last of ``expected`` programs to arrive. The last one sees everything the others wrote."""
    tl.debug_barrier()  # the stores of all threads come before the release
    return tl.atomic_add(count_ptr, 1, sem="acq_rel") == expected - 1


@triton.jit
def score_patch(
    g_ptr, W_ptr, values_ptr, indices_ptr, scores_ptr, P, K, D, F, g_s, W_s, f_s, i_s, b, p,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    g_ptr += b * g_s[0] + p * g_s[1]
    values_ptr += b * f_s[0] + p * f_s[1]
    indices_ptr += b * i_s[0] + p * i_s[1]
    score = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        score += contributions_of(
            g_ptr, W_ptr, values_ptr, indices_ptr, first, K, D, F, g_s[2], W_s, f_s[2], i_s[2], BLOCK_K, BLOCK_F
        )
    tl.store(scores_ptr + b * P + p, tl.sum(score))


@triton.jit
def finish(
    scores_ptr, kappa_ptr, c_max_ptr, rows_ptr, flow_ptr, gates_ptr, out_ptr, C, B, H, N, P, splits, r_s, b,
    IDENTITY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_STEP: tl.constexpr,
):  # fmt: skip
    """The gates and new rows of image ``b``. Other programs' results bypass the L1 cache (.cg), which may be stale."""
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
            w = tl.where(c_max == 1, 1.0, multiplier(s, m, scale, kappa, c_max))  # exactly 1, even if a score is NaN
            tl.store(gates_ptr + row * P + p, w, mask=patch)
            rows = tl.load(rows_ptr + c * r_s[0] + b * r_s[1] + n * r_s[2], mask=n < N).to(tl.float32)
            flow = sum_splits(flow_ptr + row * N + n, C * B * N, splits, n < N)
            tl.store(out_ptr + row * N + n, step(rows, flow, tl.where(patch, w, 1.0), H, IDENTITY), mask=n < N)


@triton.jit
def gated_relevancy_kernel(
    q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, g_ptr, W_ptr, values_ptr, indices_ptr, kappa_ptr, c_max_ptr,
    flow_ptr, scores_ptr, gates_ptr, out_ptr, count_ptr, scale, C, B, H, N, DH, P, K, D, F, key_tiles, splits, heads,
    q_s, k_s, v_s, o_s, r_s, g_s, W_s, f_s, i_s, IDENTITY: tl.constexpr, ROWS_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_STEP: tl.constexpr,
):  # fmt: skip
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0) - P
    if program < tiles:  # the longer ones come first
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
            g_ptr, W_ptr, values_ptr, indices_ptr, scores_ptr, P, K, D, F, g_s, W_s, f_s, i_s, b, program - tiles,
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
    g: Tensor,  # [B, P, d]; the patches are the last P of the N tokens, and the tokens before them have gate 1
    W_dec: Tensor,  # [F, d]
    values: Tensor,  # [B, P, K]
    indices: Tensor,  # [B, P, K]
    kappa: Tensor,  # [C]
    c_max: Tensor,  # [C], 1 for a configuration that does not gate this block
    paper: bool,  # whether E includes the identity
    *,
    lse: Tensor | None = None,  # [B, H, N], natural log-sum-exp of each query's logits, if the model kept it
) -> tuple[Tensor, Tensor, Tensor]:
    """New rows [C, B, N], scores [B, P] and gates [C, B, P], with the dtype of ``rows``; sums are in float32.

    For an index outside of [0, F), the patch's score and its image's gates are NaN.
    """
    (C, B, N), H, (_, P, K), d = rows.shape, q.shape[1], values.shape, g.shape[-1]
    out, scores, gates = (
        torch.empty(shape, dtype=rows.dtype, device=rows.device) for shape in ((C, B, N), (B, P), (C, B, P))
    )
    if B == 0:
        return out, scores, gates
    lse = log_sum_exp(q, k, scale) if lse is None else lse.float().contiguous()
    kappa, c_max = (t.to(rows.device, torch.float32).contiguous() for t in (kappa, c_max))
    shared = flow_arguments(rows, q, k, v, dO, lse, scale, paper) | {
        "g_ptr": g,
        "W_ptr": W_dec,
        "values_ptr": values,
        "indices_ptr": indices,
        "kappa_ptr": kappa,
        "c_max_ptr": c_max,
        "scores_ptr": scores,
        "gates_ptr": gates,
        "out_ptr": out,
        "P": P,
        "K": K,
        "D": d,
        "F": W_dec.shape[0],
        "g_s": g.stride(),
        "W_s": W_dec.stride(),
        "f_s": values.stride(),
        "i_s": indices.stride(),
        "BLOCK_F": COLUMNS,
        "BLOCK_P": triton.next_power_of_2(P),
        "BLOCK_STEP": min(1024, triton.next_power_of_2(N)),
    }

    def run(config: tuning.Config) -> tuple[Tensor, Tensor, Tensor]:
        BLOCK_C, key_tiles, row_tiles, splits, heads = tiling(C, B, H, N, config["BLOCK_M"])
        gated_relevancy_kernel[(key_tiles * row_tiles * splits + P, B)](
            **shared,
            flow_ptr=torch.empty(splits, C, B, N, dtype=torch.float32, device=rows.device),
            count_ptr=torch.zeros(B, dtype=torch.int32, device=rows.device),
            key_tiles=key_tiles,
            splits=splits,
            heads=heads,
            BLOCK_C=BLOCK_C,
            **config,
        )
        return out, scores, gates

    kind, half = ("gated_relevancy, one row", ONE_ROW) if C == 1 else ("gated_relevancy", ROWS)
    candidates = EXACT if q.dtype == torch.float32 else half
    return run(tuning.choose(kind, q, (C, *q.shape, K, d), candidates, run))
