"""``relevancy``: one block's step for C rows, beside the version that stores attention and its gradient."""

import torch
import torch.nn.functional as F

from bench.suite import DTYPES, Case, Provider, Suite, Work, direct, op_providers
from fastfg import reference

IMAGES = 1  # compared with the reference


def arguments(case, device):
    randn = case.generator(device)
    q, k, v, dO = (randn(case.B, case.H, case.N, case.dh) for _ in range(4))
    rows = randn(case.C, case.B, case.N).float().abs()
    gates = randn(case.C, case.B, case.N).float().exp()
    return rows, q, k, v, dO, case.dh**-0.5, gates


def at_once(rows, q, k, v, dO, scale, gates):
    """Store A and dA in full, [B, H, N, N]."""
    E = reference.attention_map(torch.softmax(q @ k.mT * scale, -1), dO @ v.mT)
    return rows + torch.einsum("cbn,bnm->cbm", rows, E.to(rows.dtype)) * gates


def sdpa_backward(rows, q, k, v, dO, scale, gates):
    """torch's own backward pass through the same attention: five matrix products, where relevancy needs two."""
    with torch.enable_grad():
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return lambda: torch.autograd.grad(out, (q, k, v), dO, retain_graph=True)


def part(arguments):
    rows, q, k, v, dO, scale, gates = arguments
    return rows[:, :IMAGES], q[:IMAGES], k[:IMAGES], v[:IMAGES], dO[:IMAGES], scale, gates[:, :IMAGES]


def work(case: Case) -> Work:
    """One matrix product each for A and dA; q, k, v, dO, rows and gates are read once, the new rows written once."""
    size = torch.finfo(DTYPES[case.dtype]).bits // 8
    read = 4 * case.B * case.H * case.N * case.dh * size + 3 * 4 * case.C * case.B * case.N
    return Work(bytes=read, flops=4 * case.B * case.H * case.N**2 * case.dh)


def shapes(dtype, *sizes):
    return [Case({"C": 1, "B": B, "H": H, "N": N, "dh": 64}, dtype) for B, H, N in sizes]


SUITE = Suite(
    name="relevancy",
    small=shapes("float32", (8, 12, 197), (2, 12, 577), (2, 6, 1370)),
    full=[
        *shapes("bfloat16", *((B, 12, N) for N in (197, 50) for B in (1, 8, 64, 256))),
        *shapes("bfloat16", (64, 12, 577), (64, 12, 1370), (16, 12, 4097)),
        *shapes("float32", (64, 12, 197)),
    ],
    providers={
        **op_providers("relevancy", at_once),
        "whole A and dA": Provider(direct(at_once), bar="whole"),
        "SDPA backward": Provider(sdpa_backward, bar="part"),
    },
    arguments=arguments,
    part=part,
    pick=lambda result, arguments: (result[:, :IMAGES],),
    exact=reference.relevancy,
    work=work,
)


def test_relevancy(bench, case, provider):
    bench(SUITE, case, provider)
