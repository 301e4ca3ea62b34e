"""One block of the row form: ``r <- r + (r @ E) * w`` with ``E = mean_h max(A * dA, 0)`` (equations 1 and 6).

``A = softmax(q k^T scale)`` and ``dA = dO v^T`` are made again in tiles, so nothing of size N x N is in memory.
A program owns some keys of one image: it holds their ``k`` and ``v`` while the queries of one head after another
stream by, and keeps ``rows @ E`` of its keys. Tiles lie as [keys, queries]: the product with ``rows`` then reads
``E`` from registers. Few images leave the card idle, so heads are split among programs as well; each split writes
its own partial sum, and a last kernel adds them in order and applies the gate.

Operations: ``4 B H N^2 dh`` (two matrix products), ``2 B H N^2 dh`` more where the log-sum-exp is not given, and
one exponential for each of the ``B H N^2`` entries. Bytes: q, k, v and dO once, ``4 B H N dh`` elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
ROWS_AT_ONCE = 16  # the least that a matrix product takes


@triton.jit
def lse_kernel(
    q_ptr, k_ptr, lse_ptr, scale, H, N, DH,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log(sum(exp(q k^T scale))) of BLOCK_N queries, streaming over the keys."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q_at = q_ptr + b * q_b + h * q_h + n[:, None] * q_n + d[None, :] * q_d
    q = tl.load(q_at, mask=(n < N)[:, None] & (d < DH)[None, :], other=0.0)
    k_base = k_ptr + b * k_b + h * k_h

    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < N
        k = tl.load(k_base + m[None, :] * k_n + d[:, None] * k_d, mask=inside[None, :] & (d < DH)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        s = tl.where(inside[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + (b * H + h) * N + n, (top + tl.log2(total)) / LOG2_E, mask=n < N)


@triton.jit
def flow_kernel(
    q_ptr, k_ptr, v_ptr, dO_ptr, lse_ptr, rows_ptr, flow_ptr, scale, C, B, H, N, DH, splits, heads,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, r_c, r_b, r_n,
    ONE_ROW: tl.constexpr, ROWS_PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``sum_h rows @ max(A * dA, 0)`` [BLOCK_C, BLOCK_M] over ``heads`` heads, into the partial sum of this split.

    Entries outside N need no mask: a query there has dO = 0, so dA = 0, and a key there is not stored.
    """
    split, c_tile = tl.program_id(1) % splits, tl.program_id(1) // splits
    b = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    keys = (m < N)[:, None] & (d < DH)[None, :]
    rows_base = rows_ptr + b * r_b

    flow = tl.zeros([BLOCK_M, BLOCK_N if ONE_ROW else BLOCK_C], tl.float32)
    for h in range(split * heads, min(split * heads + heads, H)):
        k = tl.load(k_ptr + b * k_b + h * k_h + m[:, None] * k_n + d[None, :] * k_d, mask=keys, other=0.0)
        v = tl.load(v_ptr + b * v_b + h * v_h + m[:, None] * v_n + d[None, :] * v_d, mask=keys, other=0.0)
        q_base = q_ptr + b * q_b + h * q_h
        o_base = dO_ptr + b * o_b + h * o_h
        lse_base = lse_ptr + (b * H + h) * N
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            queries = (n < N)[None, :] & (d < DH)[:, None]
            q = tl.load(q_base + n[None, :] * q_n + d[:, None] * q_d, mask=queries, other=0.0)
            dO = tl.load(o_base + n[None, :] * o_n + d[:, None] * o_d, mask=queries, other=0.0)
            lse = tl.load(lse_base + n, mask=n < N, other=0.0) * LOG2_E
            attn = tl.exp2(tl.dot(k, q, input_precision="ieee") * (scale * LOG2_E) - lse[None, :])
            E = tl.maximum(attn * tl.dot(v, dO, input_precision="ieee"), 0.0, propagate_nan=tl.PropagateNan.ALL)
            if ONE_ROW:  # summed over the queries once, at the end
                row = tl.load(rows_base + c_tile.to(tl.int64) * r_c + n * r_n, mask=n < N, other=0.0).to(tl.float32)
                flow += E * row[None, :]
            else:
                at = rows_base + c[None, :].to(tl.int64) * r_c + n[:, None] * r_n
                rows = tl.load(at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
                flow = tl.dot(E, rows, flow, input_precision=ROWS_PRECISION)

    if ONE_ROW:
        at = ((split.to(tl.int64) * C + c_tile) * B + b) * N + m
        tl.store(flow_ptr + at, tl.sum(flow, 1), mask=m < N)
    else:
        at = ((split.to(tl.int64) * C + c[None, :]) * B + b) * N + m[:, None]
        tl.store(flow_ptr + at, flow, mask=(m < N)[:, None] & (c < C)[None, :])


@triton.jit
def gate_kernel(
    rows_ptr, flow_ptr, gates_ptr, out_ptr, size, H, splits,
    GATED: tl.constexpr, IDENTITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rows + (sum over splits of flow / H [+ rows]) * gates`` (eq. 6)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    rows = tl.load(rows_ptr + at, mask=inside).to(tl.float32)
    flow = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        flow += tl.load(flow_ptr + at, mask=inside)
        flow_ptr += size
    flow = flow / H
    if IDENTITY:
        flow += rows
    if GATED:
        flow *= tl.load(gates_ptr + at, mask=inside).to(tl.float32)
    tl.store(out_ptr + at, rows + flow, mask=inside)


def blocks(dh: int, dtype: torch.dtype, one_row: bool) -> dict[str, int]:
    """Tile sizes of queries, keys and head width, and the warps: the largest that spill no register on any card.

    float32 products are exact ones, without the matrix unit, and their tiles are small.
    """
    M, N, num_warps = (32, 32, 8) if dtype == torch.float32 else (64, 32, 4) if one_row else (128, 32, 8)
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_D": max(16, triton.next_power_of_2(dh)), "num_warps": num_warps}


def rows_precision(dtype: torch.dtype) -> str:
    """``E`` and ``rows`` are float32: exact for exact inputs, else in three bfloat16 products, good to 2^-16."""
    return "ieee" if dtype == torch.float32 or triton.knobs.runtime.interpret else "bf16x3"


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Natural log-sum-exp [B, H, N] of each query's logits, float32."""
    B, H, N, dh = q.shape
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    block = blocks(dh, q.dtype, one_row=True)
    block["BLOCK_N"] = block["BLOCK_M"]  # here the queries are the rows of the product
    grid = (B * H, triton.cdiv(N, block["BLOCK_N"]))
    lse_kernel[grid](q, k, lse, scale, H, N, dh, *q.stride(), *k.stride(), **block, num_stages=2)
    return lse


def relevancy(
    rows: Tensor,  # [C, B, N]
    q: Tensor,  # [B, H, N, dh]
    k: Tensor,  # [B, H, N, dh]
    v: Tensor,  # [B, H, N, dh]
    dO: Tensor,  # [B, H, N, dh]
    scale: float,
    gates: Tensor | None = None,  # [C, B, N], 1 for prefix tokens; None: no gate in this block
    identity: str = "transmm",
    *,
    lse: Tensor | None = None,  # [B, H, N], natural log-sum-exp of each query's logits, where the model kept it
) -> Tensor:
    """One block of the row form -> [C, B, N], of ``rows``' dtype; sums are in float32."""
    if identity not in ("transmm", "paper"):
        raise ValueError(f"identity: expected 'transmm' or 'paper', got {identity!r}")
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    (C, B, N), (_, H, _, dh) = rows.shape, q.shape
    lse = log_sum_exp(q, k, scale) if lse is None else lse.float().contiguous()

    one_row = C == 1
    block = blocks(dh, q.dtype, one_row)
    BLOCK_C = 1 if one_row else ROWS_AT_ONCE
    key_tiles, row_tiles = triton.cdiv(N, block["BLOCK_M"]), triton.cdiv(C, BLOCK_C)
    heads = triton.cdiv(H, min(H, triton.cdiv(PROGRAMS, key_tiles * row_tiles * B)))
    splits = triton.cdiv(H, heads)
    flow = torch.empty(splits, C, B, N, dtype=torch.float32, device=rows.device)
    flow_kernel[(key_tiles, splits * row_tiles, B)](
        q, k, v, dO, lse, rows, flow, scale, C, B, H, N, dh, splits, heads,
        *q.stride(), *k.stride(), *v.stride(), *dO.stride(), *rows.stride(),
        ONE_ROW=one_row, ROWS_PRECISION=rows_precision(q.dtype), BLOCK_C=BLOCK_C, **block, num_stages=2,
    )  # fmt: skip

    BLOCK = 256
    gate_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        rows.contiguous(), flow, rows if gates is None else gates.contiguous(), out, out.numel(), H, splits,
        GATED=gates is not None, IDENTITY=identity == "paper", BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out
