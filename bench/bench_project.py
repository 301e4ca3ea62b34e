"""``project``: T = B x P tokens with K of F features active, compared with the dense product of the paper."""

import functools

import torch
import torch.nn.functional as F

from bench.suite import Case, Provider, Suite, Work, cases, direct, first, op_providers
from fastfg import reference

TOKENS = 64  # compared with the reference


def arguments(case, device):
    randn, T = case.generator(device), case.B * case.P
    W_dec = F.normalize(randn(case.F, case.d), dim=1)
    random = torch.Generator(device).manual_seed(1)
    indices = torch.randint(case.F, (T, case.K), generator=random, device=device)
    g, values = randn(T, case.d), randn(T, case.K).abs()
    return g, W_dec.bfloat16() if case.dtype == "bfloat16-decoder" else W_dec, values, indices


def at_once(g, W_dec, values, indices):
    """The reference for torch.compile: no tiles, and a sum that it can fuse with the gathering of the rows."""
    terms = values * (W_dec[indices] * g[:, None]).sum(-1)
    return terms.sum(-1), terms


def embedding_bag(g, W_dec, values, indices):
    decoded = F.embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")
    return (g * decoded).sum(-1)


def dense(g, W_dec, values, indices):
    """``(g @ W_dec.T * f).sum()`` with dense codes that were made beforehand."""
    g, values = g.to(W_dec.dtype), values.to(W_dec.dtype)
    f = values.new_zeros(len(g), len(W_dec)).scatter_add_(1, indices, values)
    return functools.partial(reference.project_dense, g, W_dec, f)


def work(case: Case) -> Work:
    """One decoder row per active feature and token; caches can make it less."""
    T = case.B * case.P
    return Work(bytes=T * case.K * (case.d * case.element + 16), flops=2 * T * case.K * case.d)


SAE = {"d": 768, "F": 49152, "K": 128}
SUITE = Suite(
    name="project",
    small=[Case({"B": 2, "P": 196, **SAE}, dtype) for dtype in ("float32", "bfloat16-decoder")],
    full=[
        *cases("bfloat16", *({"B": B, "P": P} for P in (196, 49) for B in (1, 8, 64, 256)), **SAE),
        *(Case({"B": 64, "P": 196, **SAE}, dtype) for dtype in ("float32", "bfloat16-decoder")),
    ],
    providers={
        **op_providers("project", at_once),
        "embedding_bag + dot": Provider(direct(embedding_bag), bar="whole"),
        "dense": Provider(dense, bar="whole"),
    },
    arguments=arguments,
    part=lambda given: (given[0][:TOKENS], given[1], given[2][:TOKENS], given[3][:TOKENS]),
    pick=first(TOKENS),
    exact=reference.project,
    work=work,
)


def test_project(bench, case, provider):
    bench(SUITE, case, provider)
