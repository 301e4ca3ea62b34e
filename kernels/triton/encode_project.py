"""``s_t = sum_f act((x_t @ W_enc)_f + b_enc_f) (g_t . W_dec[f])`` for SAEs of any sparsity; no array [T, F].

Each program processes some tokens, and loops over tiles of features: both products of a tile, then the activation, then
the sum over the tile's features. For a few tokens, this alone would leave the GPU idle, so the features are also split
among programs. Each split writes its own partial sum.

Operations: ``4 T d F`` (two matrix products). Bytes: ``2 T d + 2 d F`` elements. Each is read once per tile of the
other factor, mostly from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gate import tanh

ACTIVATIONS = ("relu", "tanh_relu", "jumprelu", "batch_topk", "gated")
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors

# No configuration spills registers on its GPUs. float32 takes twice the memory and three products.
SINGLE = [{"BLOCK_T": 64, "BLOCK_F": 32, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2}]
HALF = [
    {"BLOCK_T": 64, "BLOCK_F": 256, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3, "cards": (8, 10)},
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3, "cards": (9, 10)},
]


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_row(ptr, f, stride, F):
    return tl.load(ptr + f * stride, mask=f < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def encode_project_kernel(
    x_ptr, g_ptr, W_enc_ptr, W_dec_ptr, b_enc_ptr, threshold_ptr, r_mag_ptr, b_gate_ptr, b_mag_ptr, scores_ptr,
    T, D, F, splits, x_s, g_s, e_s, d_s, threshold_f,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    t64 = t[:, None].to(tl.int64)
    scores = tl.zeros([BLOCK_T], tl.float32)
    for first in range(split * BLOCK_F, F, splits * BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        f64 = f[None, :].to(tl.int64)
        pre = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        gradient = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for left in range(0, D, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            tokens = (t < T)[:, None] & (d < D)[None, :]
            features = (d < D)[:, None] & (f < F)[None, :]
            d64 = d[:, None].to(tl.int64)
            x = tl.load(x_ptr + t64 * x_s[0] + d[None, :] * x_s[1], mask=tokens, other=0.0)
            W_enc = tl.load(W_enc_ptr + d64 * e_s[0] + f64 * e_s[1], mask=features, other=0.0)
            pre = tl.dot(x, W_enc, pre, input_precision="tf32x3")
            g = tl.load(g_ptr + t64 * g_s[0] + d[None, :] * g_s[1], mask=tokens, other=0.0)
            W_dec = tl.load(W_dec_ptr + d64 * d_s[1] + f64 * d_s[0], mask=features, other=0.0)
            gradient = tl.dot(g, W_dec, gradient, input_precision="tf32x3")  # eq. 2

        if ACTIVATION == "gated":  # has no b_enc
            code = relu(pre * tl.exp(load_row(r_mag_ptr, f, 1, F)) + load_row(b_mag_ptr, f, 1, F))
            code = tl.where(pre + load_row(b_gate_ptr, f, 1, F) <= 0, 0.0, code)  # keeps a NaN
        else:
            pre += load_row(b_enc_ptr, f, 1, F)
            code = relu(pre)
            if ACTIVATION == "tanh_relu":
                code = tanh(code)
            elif ACTIVATION == "jumprelu" or ACTIVATION == "batch_topk":
                code = tl.where(pre <= load_row(threshold_ptr, f, threshold_f, F), 0.0, code)
        scores += tl.sum(tl.where((f < F)[None, :], code * gradient, 0.0), 1)  # eq. 3
    tl.store(scores_ptr + split.to(tl.int64) * T + t, scores, mask=t < T)


def encode_project(
    x: Tensor,  # [T, d], already normalised, b_dec already subtracted
    g: Tensor,  # [T, d]
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    W_dec: Tensor,  # [F, d]
    activation: str,  # any but topk
    threshold: Tensor | None,  # [] or [F]
    r_mag: Tensor | None,  # [F]
    b_gate: Tensor | None,  # [F]
    b_mag: Tensor | None,  # [F]
) -> Tensor:
    """Scores [T] with ``x``'s dtype. Products are in the dtypes of encoder and decoder; sums are in float32."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    (T, d), F, dtype = x.shape, W_enc.shape[1], x.dtype
    if T == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    x, g, b_enc = x.to(W_enc.dtype), g.to(W_dec.dtype), b_enc.contiguous()
    unused = b_enc  # in place of a parameter that the activation does not have
    limit = unused if threshold is None else threshold.to(x.device).expand(F)
    r_mag, b_gate, b_mag = (unused if p is None else p.to(x.device).contiguous() for p in (r_mag, b_gate, b_mag))

    def run(config: tuning.Config) -> Tensor:
        token_tiles, feature_tiles = triton.cdiv(T, config["BLOCK_T"]), max(1, triton.cdiv(F, config["BLOCK_F"]))
        splits = min(feature_tiles, triton.cdiv(PROGRAMS, token_tiles))
        partial = torch.empty(splits, T, dtype=torch.float32, device=x.device)
        encode_project_kernel[(token_tiles, splits)](
            x_ptr=x,
            g_ptr=g,
            W_enc_ptr=W_enc,
            W_dec_ptr=W_dec,
            b_enc_ptr=b_enc,
            threshold_ptr=limit,
            r_mag_ptr=r_mag,
            b_gate_ptr=b_gate,
            b_mag_ptr=b_mag,
            scores_ptr=partial,
            T=T,
            D=d,
            F=F,
            splits=splits,
            x_s=x.stride(),
            g_s=g.stride(),
            e_s=W_enc.stride(),
            d_s=W_dec.stride(),
            threshold_f=limit.stride(0),
            ACTIVATION=activation,
            **config,
        )
        return partial.sum(0).to(dtype)

    return run(tuning.choose("encode_project", x, (T, d, F), SINGLE if x.dtype == torch.float32 else HALF, run))
