"""One Adam step of a TopK SAE from its sparse codes: the gradients and the update of each feature in one visit.

The (token, feature) pairs are sorted by feature. Each program processes FEATURES features, one after the other: it
reads BLOCK_P of a feature's pairs at a time, sums the gradients of its encoder and decoder rows in registers, and
updates both rows. No gradient [F, d] is stored. The order of the sums is fixed.

Operations: ``6 P d`` for P pairs. Bytes: six arrays [F, d] read and written, and ``2 P d`` elements of the gradients
and tokens, which come from the cache if [T, d] fits there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEATURES = 16
TILES = {"BLOCK_P": 4, "num_warps": 4}  # not tuned: a step can't be repeated to time it


@triton.jit
def adam(w, gradient, m, v, beta1, beta2, step_size, root_correction, eps):
    """The weights and both moments after a step."""
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    return w - step_size * m / (tl.sqrt_rn(v) / root_correction + eps), m, v


@triton.jit
def adam_topk_kernel(
    x_ptr, g_ptr, aux_g_ptr, pair_ptr, value_ptr, start_ptr,
    enc_ptr, bias_ptr, dec_ptr, enc_m_ptr, bias_m_ptr, dec_m_ptr, enc_v_ptr, bias_v_ptr, dec_v_ptr,
    partial_ptr, counts_ptr, D, F, MAIN, K, J, beta1, beta2, step_size, root_correction, eps,
    UNIT_NORM: tl.constexpr, FEATURES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    of_input = tl.zeros([BLOCK_D], tl.float32)
    for n in range(0, FEATURES):
        f = tl.program_id(0).to(tl.int64) * FEATURES + n
        if f < F:
            row = f * D + d
            w = tl.load(dec_ptr + row, mask=inside, other=0.0)
            begin, end = tl.load(start_ptr + f), tl.load(start_ptr + f + 1)
            of_enc = tl.zeros([BLOCK_D], tl.float32)
            of_dec = tl.zeros([BLOCK_D], tl.float32)
            of_codes = tl.zeros([BLOCK_P], tl.float32)
            active = tl.zeros([BLOCK_P], tl.int32)
            for first in range(begin, end, BLOCK_P):
                i = first + tl.arange(0, BLOCK_P)
                pair = tl.load(pair_ptr + i, mask=i < end, other=0)
                value = tl.load(value_ptr + pair, mask=i < end, other=0.0)
                main = pair < MAIN
                token = tl.where(main, pair // K, (pair - MAIN) // J)
                at = token[:, None] * D + d[None, :]
                mask = (i < end)[:, None] & inside[None, :]
                g = tl.load(tl.where(main[:, None], g_ptr + at, aux_g_ptr + at), mask=mask, other=0.0)
                x = tl.load(x_ptr + at, mask=mask, other=0.0)
                of_code = tl.sum(g * w[None, :], 1)
                of_dec += tl.sum(value[:, None] * g, 0)
                of_enc += tl.sum(of_code[:, None] * x, 0)
                of_codes += of_code
                active += (main & (i < end)).to(tl.int32)
            tl.store(counts_ptr + f, tl.sum(active))
            of_bias = tl.sum(of_codes)
            e = tl.load(enc_ptr + row, mask=inside, other=0.0)
            of_input += of_bias * e
            m, v = tl.load(enc_m_ptr + row, mask=inside, other=0.0), tl.load(enc_v_ptr + row, mask=inside, other=0.0)
            e, m, v = adam(e, of_enc, m, v, beta1, beta2, step_size, root_correction, eps)
            tl.store(enc_ptr + row, e, mask=inside)
            tl.store(enc_m_ptr + row, m, mask=inside)
            tl.store(enc_v_ptr + row, v, mask=inside)
            if UNIT_NORM:
                of_dec -= tl.sum(of_dec * w) * w
            m, v = tl.load(dec_m_ptr + row, mask=inside, other=0.0), tl.load(dec_v_ptr + row, mask=inside, other=0.0)
            w, m, v = adam(w, of_dec, m, v, beta1, beta2, step_size, root_correction, eps)
            if UNIT_NORM:
                w = w / tl.sqrt_rn(tl.sum(tl.where(inside, w * w, 0.0)))
            tl.store(dec_ptr + row, w, mask=inside)
            tl.store(dec_m_ptr + row, m, mask=inside)
            tl.store(dec_v_ptr + row, v, mask=inside)
            b, m_b, v_b = tl.load(bias_ptr + f), tl.load(bias_m_ptr + f), tl.load(bias_v_ptr + f)
            b, m_b, v_b = adam(b, of_bias, m_b, v_b, beta1, beta2, step_size, root_correction, eps)
            tl.store(bias_ptr + f, b)
            tl.store(bias_m_ptr + f, m_b)
            tl.store(bias_v_ptr + f, v_b)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, of_input, mask=inside)


def sorted_pairs(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """The numbers of the pairs in the order of their features, and the first of each feature [F + 1].

    Pairs whose value is 0, or whose index is out of range, come last and belong to no feature.
    """
    known = (indices >= 0) & (indices < F) & ~(values <= 0)
    feature, pair = torch.where(known, indices, F).sort(stable=True)
    return pair, torch.searchsorted(feature, torch.arange(F + 1, device=indices.device))


def adam_topk(
    x: Tensor,  # [T, d], b_dec already subtracted
    g: Tensor,  # [T, d]
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
    aux_g: Tensor | None,  # [T, d]
    aux_values: Tensor | None,  # [T, J]
    aux_indices: Tensor | None,  # [T, J]
    weights: list[Tensor],  # W_enc [d, F] with contiguous columns, b_enc [F], W_dec [F, d]
    m: list[Tensor],
    v: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    unit_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Changes ``weights``, ``m`` and ``v``; all numbers are float32.

    Returns the gradient at the input, summed over tokens [d], and the number of tokens in which each feature is active
    [F]. Pairs with an index outside of [0, F) are left out.
    """
    (T, d), K, F = x.shape, values.shape[1], len(weights[1])
    J = 0 if aux_values is None else aux_values.shape[1]
    if aux_g is not None and aux_values is not None and aux_indices is not None:
        value = torch.cat([values.flatten(), aux_values.flatten()])
        index = torch.cat([indices.flatten(), aux_indices.flatten()])
    else:
        value, index = values.flatten(), indices.flatten()
    pair, start = sorted_pairs(value, index, F)
    partial = torch.empty(triton.cdiv(F, FEATURES), d, dtype=x.dtype, device=x.device)
    counts = torch.empty(F, dtype=torch.int32, device=x.device)
    state = {
        f"{part}{moment}_ptr": tensor
        for moment, tensors in (("", weights), ("_m", m), ("_v", v))
        for part, tensor in zip(("enc", "bias", "dec"), tensors, strict=True)
    }
    g, x = g.contiguous(), x.contiguous()

    adam_topk_kernel[(len(partial),)](
        x_ptr=x,
        g_ptr=g,
        aux_g_ptr=g if aux_g is None else aux_g.contiguous(),
        pair_ptr=pair,
        value_ptr=value,
        start_ptr=start,
        **state,
        partial_ptr=partial,
        counts_ptr=counts,
        D=d,
        F=F,
        MAIN=T * K,
        K=max(K, 1),
        J=max(J, 1),
        beta1=beta1,
        beta2=beta2,
        step_size=lr / (1 - beta1**step),
        root_correction=(1 - beta2**step) ** 0.5,
        eps=eps,
        UNIT_NORM=unit_norm,
        FEATURES=FEATURES,
        BLOCK_D=triton.next_power_of_2(d),
        **TILES,
    )
    return partial.sum(0), counts
