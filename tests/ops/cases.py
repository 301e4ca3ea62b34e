"""Inputs of every op at odd shapes, and each op's reference in float64."""

from __future__ import annotations

import torch

from fastfg import reference
from fastfg.reference import Activation


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encode_topk(T, d, F, k, b_dec=True):
    W_enc, b_enc = randn(d, F, seed=1) / d**0.5, 0.1 * randn(F, seed=2)
    return (randn(T, d, seed=3), W_enc, b_enc, 0.1 * randn(d, seed=4) if b_dec else None, k)


def project(T, d, F, K):
    indices = torch.randint(0, F, (T, K), generator=torch.Generator().manual_seed(5))
    return (randn(T, d, seed=1), randn(F, d, seed=2), randn(T, K, seed=3).abs(), indices)


def encode_project(T, d, F, name):
    extra = {
        "jumprelu": {"threshold": randn(F, seed=6).abs()},
        "batch_topk": {"threshold": torch.tensor(0.3, dtype=torch.float64)},
        "gated": {"r_mag": randn(F, seed=6), "b_gate": randn(F, seed=7), "b_mag": randn(F, seed=8)},
    }
    x, W_enc, b_enc, _, _ = encode_topk(T, d, F, 1)
    activation = Activation(name, **extra.get(name, {}))
    return (x, randn(T, d, seed=9), W_enc, b_enc, randn(F, d, seed=10), activation)


def gate(shape, kappa=1.0, c_max=50.0):
    return (randn(*shape, seed=1), kappa, c_max)


def relevancy(C, B, H, N, dh, gated=True, identity="transmm"):
    q, k, v, dO = randn(4, B, H, N, dh, seed=1)
    gates = randn(C, B, N, seed=2).exp() if gated else None
    return (randn(C, B, N, seed=3), q, k, v, dO, dh**-0.5, gates, identity)


CASES = {
    **{
        f"encode_topk T={T} d={d} F={F} K={k}": ("encode_topk", encode_topk(T, d, F, k, T != 49))
        for T, d, F, k in [
            (1, 33, 100, 1),
            (49, 33, 1000, 13),
            (197, 192, 2500, 128),
            (3, 33, 100, 100),
            (0, 33, 100, 5),
        ]
    },
    **{
        f"project T={T} d={d} F={F} K={K}": ("project", project(T, d, F, K))
        for T, d, F, K in [(1, 33, 100, 1), (49, 33, 1000, 13), (197, 192, 300, 128), (5, 768, 50, 50), (0, 33, 100, 5)]
    },
    **{
        f"encode_project {name} T={T} d={d} F={F}": ("encode_project", encode_project(T, d, F, name))
        for name in ("relu", "tanh_relu", "jumprelu", "batch_topk", "gated")
        for T, d, F in [(1, 33, 100), (197, 192, 5000), (0, 33, 100)]
    },
    **{f"gate {shape}": ("gate", gate(shape)) for shape in [(1,), (2,), (7, 49), (3, 196), (2, 3, 257), (1, 4096)]},
    "gate, many configurations": (
        "gate",
        gate(
            (2, 3, 9),
            torch.tensor([0.5, 2.0]).double()[:, None, None],
            torch.tensor([10.0, 50.0]).double()[:, None, None],
        ),
    ),
    **{
        f"relevancy C={C} B={B} H={H} N={N} dh={dh} {identity}": (
            "relevancy",
            relevancy(C, B, H, N, dh, gated=N != 50, identity=identity),
        )
        for C, B, H, N, dh, identity in [
            (1, 1, 1, 5, 32, "transmm"),
            (3, 2, 3, 50, 48, "paper"),
            (2, 2, 6, 197, 64, "transmm"),
            (1, 1, 2, 257, 80, "paper"),
            (1, 1, 2, 1370, 32, "transmm"),
        ]
    },
}


def cast(arguments, dtype):
    """Floating tensors among the arguments in ``dtype``, also those inside an activation."""

    def one(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, Activation):
            return Activation(value.name, value.k, *map(one, (value.threshold, value.r_mag, value.b_gate, value.b_mag)))
        return value

    return tuple(map(one, arguments))


def exact(op, arguments):
    """The op's reference on the same values in float64."""
    return getattr(reference, op)(*cast(arguments, torch.float64))
