"""One block of the row form: ``r <- r + (r @ E) * w`` with ``E = mean_h max(A * dA, 0)`` (equations 1 and 6).

``A = softmax(q k^T scale)`` and ``dA = dO v^T`` are recomputed in tiles, so nothing of size N x N is in memory. Each
program processes some keys of one image. It keeps their ``k`` and ``v``, loops over the heads and their queries, and
sums ``rows @ E`` for its keys. Tiles are [keys, queries], so that the product with ``rows`` reads ``E`` from registers.
For a few images, this alone would leave the GPU idle, so the heads are also split among programs. Each split writes its
own partial sum, and a last kernel adds them in order and applies the gate. Without a split, the program does that
itself.

Operations: ``4 B H N^2 dh`` (two matrix products), ``2 B H N^2 dh`` more if the log-sum-exp is not given, and
one exponential per entry of ``B H N^2``. Bytes: q, k, v and dO once, ``4 B H N dh`` elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
ROWS_AT_ONCE = 16  # the smallest side of a matrix product

# A program has BLOCK_M keys and takes BLOCK_N queries at a time; for the log-sum-exp it is the other way round. No
# configuration spills registers on its GPUs. float32 products are exact, without the matrix unit. They need small tiles
# and all available registers.
EXACT = [{"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 255}]
EXACT_WIDE = [{"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}]  # heads wider than 64
ONE_ROW = [
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3, "cards": (9,)},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "cards": (8,)},
]
ROWS = [
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "cards": (8, 9)},
]
LOG_SUM_EXP = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "cards": (9,)},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
]


@triton.jit
def lse_kernel(
    q_ptr, k_ptr, lse_ptr, scale, H, N, DH, q_s, k_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log(sum(exp(q k^T scale))) of BLOCK_M queries, BLOCK_N keys at a time."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_at = q_ptr + b * q_s[0] + h * q_s[1] + m[:, None] * q_s[2] + d[None, :] * q_s[3]
    q = tl.load(q_at, mask=(m < N)[:, None] & (d < DH)[None, :], other=0.0)
    k_base = k_ptr + b * k_s[0] + h * k_s[1] + d[:, None] * k_s[3]

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_base + n[None, :] * k_s[2], mask=(n < N)[None, :] & (d < DH)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        s = tl.where((n < N)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + (b * H + h) * N + m, (top + tl.log2(total)) / LOG2_E, mask=m < N)


@triton.jit
def flow_tile(
    q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, scale, C, H, N, DH, q_s, k_s, v_s, o_s, r_s,
    b, c, m, first_head, last_head, ROWS_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``sum_h rows @ max(A * dA, 0)`` [BLOCK_M, BLOCK_C] over some heads, for keys ``m`` and rows ``c`` of image ``b``.

    Entries outside N need no mask. A query there has dO = 0, so dA = 0. A key there is not stored.
    """
    ONE_ROW: tl.constexpr = c.shape[0] == 1
    d = tl.arange(0, BLOCK_D)
    keys = (m < N)[:, None] & (d < DH)[None, :]
    rows_at = rows_ptr + b * r_s[1] + c[None, :].to(tl.int64) * r_s[0]
    flow = tl.zeros([m.shape[0], BLOCK_N if ONE_ROW else c.shape[0]], tl.float32)
    for h in range(first_head, last_head):
        k = tl.load(k_ptr + b * k_s[0] + h * k_s[1] + m[:, None] * k_s[2] + d[None, :] * k_s[3], mask=keys, other=0.0)
        v = tl.load(v_ptr + b * v_s[0] + h * v_s[1] + m[:, None] * v_s[2] + d[None, :] * v_s[3], mask=keys, other=0.0)
        q_base = q_ptr + b * q_s[0] + h * q_s[1] + d[:, None] * q_s[3]
        o_base = dO_ptr + b * o_s[0] + h * o_s[1] + d[:, None] * o_s[3]
        lse_base = lse_ptr + (b * H + h) * N
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            queries = (n < N)[None, :] & (d < DH)[:, None]
            q = tl.load(q_base + n[None, :] * q_s[2], mask=queries, other=0.0)
            dO = tl.load(o_base + n[None, :] * o_s[2], mask=queries, other=0.0)
            lse = tl.load(lse_base + n, mask=n < N, other=0.0) * LOG2_E
            attn = tl.exp2(tl.dot(k, q, input_precision="ieee") * (scale * LOG2_E) - lse[None, :])
            E = tl.maximum(attn * tl.dot(v, dO, input_precision="ieee"), 0.0, propagate_nan=tl.PropagateNan.ALL)
            if ONE_ROW:  # the sum over the queries is taken once, at the end
                rows = tl.load(rows_at + n[None, :] * r_s[2], mask=(n < N)[None, :], other=0.0).to(tl.float32)
                flow += E * rows
            else:
                rows_mask = (n < N)[:, None] & (c < C)[None, :]
                rows = tl.load(rows_at + n[:, None] * r_s[2], mask=rows_mask, other=0.0).to(tl.float32)
                flow = tl.dot(E, rows, flow, input_precision=ROWS_PRECISION)
    return tl.sum(flow, 1)[:, None] if ONE_ROW else flow


@triton.jit
def step(rows, flow, w, H, IDENTITY: tl.constexpr):
    """``rows + (flow / H [+ rows]) * w``: equation 6, for a flow summed over the heads."""
    flow = flow / H
    if IDENTITY:
        flow += rows
    return rows + flow * w


@triton.jit
def flow_kernel(
    q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, gates_ptr, out_ptr, scale, C, B, H, N, DH, splits, heads,
    q_s, k_s, v_s, o_s, r_s, IDENTITY: tl.constexpr, WHOLE: tl.constexpr, ROWS_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The new rows if this program has all heads (WHOLE), else the partial sum of its split."""
    split, c_tile = tl.program_id(1) % splits, tl.program_id(1) // splits
    b = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    flow = flow_tile(
        q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, scale, C, H, N, DH, q_s, k_s, v_s, o_s, r_s,
        b, c, m, split * heads, min(split * heads + heads, H), ROWS_PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    c64 = c[None, :].to(tl.int64)
    at = (c64 * B + b) * N + m[:, None]
    inside = (m < N)[:, None] & (c < C)[None, :]
    if WHOLE:
        rows = tl.load(rows_ptr + c64 * r_s[0] + b * r_s[1] + m[:, None] * r_s[2], mask=inside).to(tl.float32)
        w = 1.0 if gates_ptr is None else tl.load(gates_ptr + at, mask=inside).to(tl.float32)
        tl.store(out_ptr + at, step(rows, flow, w, H, IDENTITY), mask=inside)
    else:
        tl.store(out_ptr + split.to(tl.int64) * C * B * N + at, flow, mask=inside)


@triton.jit
def sum_splits(flow_ptr, size, splits, inside):
    """The sum of the partial sums, in order; each starts ``size`` after the one before."""
    flow = tl.zeros(inside.shape, tl.float32)
    for _ in range(splits):
        flow += tl.load(flow_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        flow_ptr += size
    return flow


@triton.jit
def step_kernel(
    rows_ptr, flow_ptr, gates_ptr, out_ptr, size, H, splits, IDENTITY: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.load(rows_ptr + at, mask=inside).to(dtype)
    flow = sum_splits(flow_ptr + at, size, splits, inside).to(dtype)
    w = 1.0 if gates_ptr is None else tl.load(gates_ptr + at, mask=inside).to(dtype)
    tl.store(out_ptr + at, step(rows, flow, w, H, IDENTITY), mask=inside)


def configs(q: Tensor, half: list[tuning.Config]) -> list[tuning.Config]:
    """``half`` for 16-bit numbers, else the configurations for exact float32 products."""
    if q.dtype != torch.float32:
        return half
    return EXACT if q.shape[-1] <= 64 else EXACT_WIDE


def head_width(dh: int) -> int:
    """The number of columns of a tile with one head."""
    return max(16, triton.next_power_of_2(dh))


def rows_precision(dtype: torch.dtype) -> str:
    """How to multiply the float32 ``E`` and ``rows``: exactly for float32 inputs, else as three bfloat16 products.

    The error of three bfloat16 products is at most 3 x 2^-16 of the product of absolute values, and usually 2^-17. That
    is far below the error of ``E`` itself, which comes from 16-bit q, k, v and dO.
    """
    return "ieee" if dtype == torch.float32 or triton.knobs.runtime.interpret else "bf16x3"


def tiling(C: int, B: int, H: int, N: int, BLOCK_M: int) -> tuple[int, int, int, int, int]:
    """Rows per tile, tiles of keys, tiles of rows, splits of the heads, and heads per split.

    The heads are split until there are about PROGRAMS programs.
    """
    BLOCK_C = 1 if C == 1 else ROWS_AT_ONCE
    key_tiles, row_tiles = triton.cdiv(N, BLOCK_M), triton.cdiv(C, BLOCK_C)
    heads = triton.cdiv(H, min(H, triton.cdiv(PROGRAMS, max(1, key_tiles * row_tiles * B))))
    return BLOCK_C, key_tiles, row_tiles, triton.cdiv(H, heads), heads


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Natural log-sum-exp [B, H, N] of each query's logits, in float32."""
    B, H, N, dh = q.shape
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)

    def run(config: tuning.Config) -> Tensor:
        grid = (B * H, triton.cdiv(N, config["BLOCK_M"]))
        lse_kernel[grid](
            q_ptr=q,
            k_ptr=k,
            lse_ptr=lse,
            scale=scale,
            H=H,
            N=N,
            DH=dh,
            q_s=q.stride(),
            k_s=k.stride(),
            BLOCK_D=head_width(dh),
            **config,
        )
        return lse

    return run(tuning.choose("log_sum_exp", q, q.shape, configs(q, LOG_SUM_EXP), run))


def flow_arguments(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, lse: Tensor, scale: float, paper: bool
) -> dict[str, Any]:
    """The arguments of every kernel with a ``flow_tile``."""
    (C, B, N), (_, H, _, dh) = rows.shape, q.shape
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dO_ptr": dO,
        "lse_ptr": lse,
        "rows_ptr": rows,
        "scale": scale,
        "C": C,
        "B": B,
        "H": H,
        "N": N,
        "DH": dh,
        "q_s": q.stride(),
        "k_s": k.stride(),
        "v_s": v.stride(),
        "o_s": dO.stride(),
        "r_s": rows.stride(),
        "IDENTITY": paper,
        "ROWS_PRECISION": rows_precision(q.dtype),
        "BLOCK_D": head_width(dh),
    }


def relevancy(
    rows: Tensor,  # [C, B, N]
    q: Tensor,  # [B, H, N, dh]
    k: Tensor,  # [B, H, N, dh]
    v: Tensor,  # [B, H, N, dh]
    dO: Tensor,  # [B, H, N, dh]
    scale: float,
    gates: Tensor | None,  # [C, B, N], 1 for prefix tokens; None: no gate in this block
    paper: bool,  # whether E includes the identity
    *,
    lse: Tensor | None = None,  # [B, H, N], natural log-sum-exp of each query's logits, if the model kept it
) -> Tensor:
    """The new rows [C, B, N] with the dtype of ``rows``. What a block adds to them is computed in float32.

    Rows in float64 keep what many blocks add that is far smaller than they are.
    """
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    (C, B, N), H = rows.shape, q.shape[1]
    lse = log_sum_exp(q, k, scale) if lse is None else lse.float().contiguous()
    gates = None if gates is None else gates.contiguous()
    shared = flow_arguments(rows, q, k, v, dO, lse, scale, paper)

    def run(config: tuning.Config) -> Tensor:
        BLOCK_C, key_tiles, row_tiles, splits, heads = tiling(C, B, H, N, config["BLOCK_M"])
        whole = splits == C == 1 and rows.dtype == torch.float32
        flow = out if whole else torch.empty(splits, C, B, N, dtype=torch.float32, device=rows.device)
        flow_kernel[(key_tiles, splits * row_tiles, B)](
            **shared,
            gates_ptr=gates,
            out_ptr=flow,
            splits=splits,
            heads=heads,
            WHOLE=whole,
            BLOCK_C=BLOCK_C,
            **config,
        )
        return out if whole else add_splits(rows, flow, gates, paper, H, out)

    kind, half = ("relevancy, one row", ONE_ROW) if C == 1 else ("relevancy", ROWS)
    return run(tuning.choose(kind, q, (C, *q.shape), configs(q, half), run))


def add_splits(rows: Tensor, flow: Tensor, gates: Tensor | None, paper: bool, H: int, out: Tensor) -> Tensor:
    """Write the new rows into ``out``, from the partial sums ``flow`` [splits, C, B, N] of the heads."""
    size = out.numel()
    step_kernel[(triton.cdiv(size, 256),)](
        rows_ptr=rows.contiguous(),
        flow_ptr=flow,
        gates_ptr=gates,
        out_ptr=out,
        size=size,
        H=H,
        splits=flow.shape[0],
        IDENTITY=paper,
        BLOCK=256,
        WIDE=rows.dtype == torch.float64,
        num_warps=4,
    )
    return out
