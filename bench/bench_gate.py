"""``gate``: scores of C configurations, B images and P patches. The launch dominates on every device."""

import torch

from bench.suite import Case, Suite, Work, cases, op_providers
from fastfg import reference


def arguments(case, device):
    scores = case.generator(device)(case.C, case.B, case.P)
    kappa = torch.linspace(0.25, 1, case.C, device=device)[:, None, None]
    return scores, kappa, torch.linspace(2, 100, case.C, device=device)[:, None, None]


def work(case: Case) -> Work:
    """Each score is read once, and each gate is written once."""
    return Work(bytes=2 * 4 * case.C * case.B * case.P, flops=0)


SUITE = Suite(
    name="gate",
    small=cases("float32", {"C": 1, "B": 2, "P": 196}, {"C": 27, "B": 2, "P": 196}),
    full=cases(
        "float32",
        *({"C": C, "B": B, "P": P} for P in (196, 49) for B in (1, 64, 256) for C in (1, 27)),
    ),
    providers=op_providers("gate"),
    arguments=arguments,
    part=lambda arguments: arguments,
    pick=lambda result, arguments: (result,),
    exact=reference.gate,
    work=work,
)


def test_gate(bench, case, provider):
    bench(SUITE, case, provider)
