"""``encode_project`` for ReLU SAEs with about L0 active features per token; no feature is cut off."""

import torch
import torch.nn.functional as F

from bench.suite import Case, Provider, Suite, Work, cases, direct, first, op_providers
from fastfg import reference
from fastfg.reference import Activation

TOKENS = 64  # compared with the reference, and used to count active features


def arguments(case, device):
    randn, T = case.generator(device), case.B * case.P
    W_enc = F.normalize(randn(case.d, case.F), dim=0)
    x, g, W_dec = randn(T, case.d), randn(T, case.d), F.normalize(randn(case.F, case.d), dim=1)
    b_enc = x.new_full((case.F,), bias_for(case.L0 / case.F))
    active = float((x[:TOKENS] @ W_enc + b_enc > 0).sum(1).double().mean())
    assert abs(active / case.L0 - 1) < 0.1, f"expected about {case.L0} active features per token, got {active}"
    return x, g, W_enc, b_enc, W_dec, Activation("relu")


def bias_for(share: float) -> float:
    """The bias that makes this share of normally distributed pre-activations positive."""
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


def at_once(x, g, W_enc, b_enc, W_dec, activation):
    """Encode, activate and multiply by ``g``, with all [T, F] intermediates in memory."""
    return reference.project_dense(g, W_dec, (x @ W_enc + b_enc).relu())


def part(arguments):
    x, g, *weights = arguments
    return x[:TOKENS], g[:TOKENS], *weights


def work(case: Case) -> Work:
    """One matrix product, and one dot product per active feature; each weight is read once."""
    T = case.B * case.P
    size = (2 * T * case.d + 2 * case.d * case.F) * case.element
    return Work(bytes=size, flops=2 * T * case.d * (case.F + case.L0))


SAE = {"d": 768, "F": 49152, "L0": 1500}
SUITE = Suite(
    name="encode_project",
    small=cases("float32", {"B": 2, "P": 196}, **SAE),
    full=[
        *cases("bfloat16", *({"B": B, "P": P} for P in (196, 49) for B in (1, 8, 64, 256)), **SAE),
        *cases("float32", {"B": 64, "P": 196}, **SAE),
    ],
    providers={
        **op_providers("encode_project", at_once),
        "GEMM + relu + dense": Provider(direct(at_once), bar="whole"),
    },
    arguments=arguments,
    part=part,
    pick=first(TOKENS),
    exact=reference.encode_project,
    work=work,
)


def test_encode_project(bench, case, provider):
    bench(SUITE, case, provider)
