"""``encode_topk``: the K largest of F pre-activations per token, beside the matrix product alone."""

import functools

import torch
import torch.nn.functional as F

from bench.suite import Case, Provider, Suite, Work, cases, op_providers
from fastfg import reference

TOKENS = 64  # compared with the reference


def arguments(case, device):
    randn, T = case.generator(device), case.B * case.P
    W_enc = F.normalize(randn(case.d, case.F), dim=0)
    return randn(T, case.d), W_enc, 0.1 * randn(case.F), 0.1 * randn(case.d), case.K


def part(arguments):
    x, *weights = arguments
    return x[:TOKENS], *weights


def pick(result, arguments):
    """The values, and the exact pre-activations of the features that the indices name."""
    values, indices = (t[:TOKENS] for t in result)
    x, W_enc, b_enc, b_dec, _ = (t.double() if isinstance(t, torch.Tensor) else t for t in part(arguments))
    return values, reference.preactivations(x, W_enc, b_enc, b_dec).gather(1, indices)


def gemm(x, W_enc, b_enc, b_dec, k):
    return functools.partial(torch.mm, x, W_enc, out=x.new_empty(len(x), len(b_enc)))


def linear_topk(x, W_enc, b_enc, b_dec, k):
    """Two torch calls. They do not define which of several equal values is taken."""
    weight, bias = W_enc.T.contiguous(), b_enc - b_dec @ W_enc

    def run():
        values, indices = F.linear(x, weight, bias).topk(k)
        return values.relu(), indices

    return run


def work(case: Case) -> Work:
    """The matrix product; x and the weights are read once, values and indices are written once."""
    T = case.B * case.P
    size = (T * case.d + case.d * case.F + T * case.K) * case.element + 8 * T * case.K
    return Work(bytes=size, flops=2 * T * case.d * case.F)


SAE = {"d": 768, "F": 49152, "K": 128}
SUITE = Suite(
    name="encode_topk",
    small=cases("float32", {"B": 2, "P": 196}, **SAE),
    full=[
        *cases("bfloat16", *({"B": B, "P": P} for P in (196, 49) for B in (1, 8, 64, 256)), **SAE),
        *cases("float32", {"B": 64, "P": 196}, **SAE),
    ],
    providers={
        **op_providers("encode_topk"),
        "linear + topk": Provider(linear_topk, bar="whole"),
        "the bare GEMM": Provider(gemm, bar="part"),
    },
    arguments=arguments,
    part=part,
    pick=pick,
    exact=reference.encode_topk,
    work=work,
)


def test_encode_topk(bench, case, provider):
    bench(SUITE, case, provider)
