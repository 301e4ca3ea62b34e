"""``gated_relevancy``: the scores, gates and relevancy step of a block in one op, beside the three separate ops."""

import torch
import torch.nn.functional as F

from bench import bench_gate, bench_project, bench_relevancy
from bench.suite import Case, Provider, Suite, Work, direct, op_providers
from fastfg import ops, reference

IMAGES = 1  # compared with the reference


def arguments(case, device):
    rows, q, k, v, dO, scale, _ = bench_relevancy.arguments(case, device)
    g, W_dec, values, indices = bench_project.arguments(case, device)
    per_image = (case.B, case.P)
    kappa, c_max = (torch.linspace(*ends, case.C, device=device) for ends in ((0.25, 1), (2, 100)))
    g, values, indices = (t.unflatten(0, per_image) for t in (g, values, indices))
    return rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max


def at_once(rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max):
    """The three equations without tiles, for torch.compile."""
    flat = (t.flatten(0, 1) for t in (values, indices))
    scores = bench_project.at_once(g.flatten(0, 1), W_dec, *flat)[0].unflatten(0, g.shape[:2]).to(rows.dtype)
    gates = reference.gate(scores, kappa[:, None, None], c_max[:, None, None])
    every = F.pad(gates, (rows.shape[-1] - gates.shape[-1], 0), value=1.0)
    return bench_relevancy.at_once(rows, q, k, v, dO, scale, every), scores, gates


def its_parts(rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max):
    """The three ops one after another, each on its default backend."""
    found = ops.project(g.flatten(0, 1), W_dec, values.flatten(0, 1), indices.flatten(0, 1))
    scores = found[0].unflatten(0, g.shape[:2]).to(rows.dtype)
    gates = ops.gate(scores.expand(len(rows), -1, -1), kappa[:, None, None], c_max[:, None, None])
    every = F.pad(gates, (rows.shape[-1] - gates.shape[-1], 0), value=1.0)
    return ops.relevancy(rows, q, k, v, dO, scale, every), scores, gates


def part(arguments):
    rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max = arguments
    n = slice(IMAGES)
    return rows[:, n], q[n], k[n], v[n], dO[n], scale, g[n], W_dec, values[n], indices[n], kappa, c_max


def pick(result, arguments):
    rows, scores, gates = result
    return rows[:, :IMAGES], scores[:IMAGES], gates[:, :IMAGES]


def work(case: Case) -> Work:
    return bench_project.work(case) + bench_gate.work(case) + bench_relevancy.work(case)


def shapes(dtype, *sizes):
    common = {"H": 12, "dh": 64, "d": 768, "F": 49152, "K": 128}
    return [Case({"C": C, "B": B, "P": N - 1, "N": N, **common}, dtype) for C, B, N in sizes]


SUITE = Suite(
    name="gated_relevancy",
    small=shapes("float32", (1, 2, 197), (27, 2, 197)),
    full=[
        *shapes("bfloat16", *((1, B, N) for N in (197, 50) for B in (1, 8, 64, 256)), (27, 64, 197)),
        *shapes("float32", (1, 64, 197)),
    ],
    providers={
        **op_providers("gated_relevancy", at_once),
        "project + gate + relevancy": Provider(direct(its_parts), bar="whole", backend="auto"),
    },
    arguments=arguments,
    part=part,
    pick=pick,
    exact=reference.gated_relevancy,
    work=work,
)


def test_gated_relevancy(bench, case, provider):
    bench(SUITE, case, provider)
