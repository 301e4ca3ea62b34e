"""Inputs of the ops in float64 on the CPU, the shapes that every backend is tested with, and the backends."""

from __future__ import annotations

import os
from functools import partial

import torch

from fastfg import ops
from fastfg.reference.encode import ACTIVATIONS, ALL_AT_ONCE, Activation
from fastfg.reference.relevancy import IDENTITIES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on CPU tensors
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def required() -> tuple[str, ...]:
    """The backends that must run every op in this process. If one is missing, its tests fail.

    On the CPU, Triton runs in a separate process, which ``tests/kernels/test_triton.py`` starts.
    """
    if INTERPRETED:
        return ("triton",)
    return ("reference", "cpp", "triton") if DEVICE.type == "cuda" else ("reference", "cpp")


if INTERPRETED:
    from tests.kernels.interpreter import serve_cpu_tensors

    serve_cpu_tensors()

BACKENDS = required()
OPS = [op for op in ops.__all__ if op != "adam_topk"]  # that one changes its arguments; see test_adam_topk.py
PAIRS = [(op, backend) for op in OPS for backend in BACKENDS]
STREAMING = [name for name in ACTIVATIONS if name not in ALL_AT_ONCE]


def device_of(backend):
    return torch.device("cpu") if backend == "cpp" else DEVICE


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encode_topk(T, d, F, k, b_dec=True):
    W_enc, b_enc = randn(d, F, seed=1) / d**0.5, 0.1 * randn(F, seed=2)
    return (randn(T, d, seed=3), W_enc, b_enc, 0.1 * randn(d, seed=4) if b_dec else None, k)


def project(T, d, F, K):
    indices = torch.randint(0, F, (T, K), generator=torch.Generator().manual_seed(5))
    return (randn(T, d, seed=1), randn(F, d, seed=2), randn(T, K, seed=3).abs(), indices)


def decode_topk(T, d, F, K, b_dec=True):
    _, W_dec, values, indices = project(T, d, F, K)
    return (values, indices, W_dec, randn(d, seed=4) if b_dec else None)


def encode_project(name, T, d, F):
    extra = {
        "jumprelu": {"threshold": randn(F, seed=6).abs()},
        "batch_topk": {"threshold": torch.tensor(0.3, dtype=torch.float64)},
        "gated": {"r_mag": randn(F, seed=6), "b_gate": randn(F, seed=7), "b_mag": randn(F, seed=8)},
    }
    x, W_enc, b_enc, _, _ = encode_topk(T, d, F, 1)
    activation = Activation(name, **extra.get(name, {}))
    return (x, randn(T, d, seed=9), W_enc, b_enc, randn(F, d, seed=10), activation)


def gate(*shape, kappa=1.0, c_max=50.0):
    return (randn(*shape, seed=1), kappa, c_max)


def many_gates(*shape):
    kappa, c_max = torch.tensor([[0.5, 2.0, 1.0], [10.0, 50.0, 1.0]], dtype=torch.float64).reshape(2, 3, 1, 1)
    return gate(*shape, kappa=kappa, c_max=c_max)


def one_gate_for_all(*shape):
    """One number for all images, expanded in memory, and one number per image."""
    kappa = torch.full((1, 1, 1), 0.7, dtype=torch.float64).expand(1, shape[-2], 1)
    return gate(*shape, kappa=kappa, c_max=1 + randn(shape[-2], 1, seed=2).exp())


def relevancy(C, B, H, N, dh, gated=True, identity="transmm"):
    q, k, v, dO = randn(4, B, H, N, dh, seed=1)
    gates = randn(C, B, N, seed=2).exp() if gated else None
    return (randn(C, B, N, seed=3), q, k, v, dO, dh**-0.5, gates, identity)


def gated_relevancy(C, B, H, N, dh, P, d, F, K, identity="transmm"):
    """If there are several configurations, the first one gates nothing: its ``c_max`` is 1."""
    g, W_dec, values, indices = project(B * P, d, F, K)
    codes = (g.unflatten(0, (B, P)), W_dec, values.unflatten(0, (B, P)), indices.unflatten(0, (B, P)))
    kappa, c_max = 0.5 + 0.1 * torch.arange(C).double(), 50 - 2.5 * torch.arange(C).double()
    c_max[:1] = 1 if C > 1 else 50
    return (*relevancy(C, B, H, N, dh)[:6], *codes, kappa, c_max, identity)


SHAPES = {  # small enough for Triton's interpreter
    encode_topk: [
        (1, 33, 300, 13),
        (49, 192, 70, 1),
        (5, 33, 1501, 13),
        (5, 192, 501, 13),
        (5, 192, 504, 13),  # rows of 16-bit numbers start at multiples of 16 bytes
        (3, 33, 100, 100),
        (0, 33, 100, 5),
    ],
    project: [
        (1, 33, 300, 13),
        (49, 192, 301, 1),
        (49, 192, 300, 13),
        (5, 300, 77, 77),
        (57, 33, 50, 13),
        (3, 33, 100, 0),
        (0, 33, 100, 5),
    ],
    decode_topk: [
        (1, 33, 300, 13),
        (49, 192, 301, 1),
        (49, 192, 300, 13, False),
        (5, 300, 77, 77),
        (3, 33, 100, 0),
        (0, 33, 100, 5),
    ],
    encode_project: [
        *((name, *sizes) for name in STREAMING for sizes in [(1, 33, 300), (49, 192, 77)]),
        *((name, 49, 192, 300) for name in ("relu", "gated")),
        ("relu", 0, 33, 100),
    ],
    gate: [(1,), (2,), (3, 1), (3, 2), (7, 49), (3, 50), (3, 196), (2, 3, 257), (3, 1369), (0, 5)],
    many_gates: [(3, 2, 9), (2, 49), (2, 50)],
    one_gate_for_all: [(3, 50), (4, 2, 50)],
    relevancy: [
        *(
            (C, 2, 2, *sizes, True, identity)
            for C in (1, 3, 17)
            for sizes in [(5, 32), (50, 48), (50, 33)]
            for identity in IDENTITIES
        ),
        (2, 2, 2, 50, 32, False),
        (1, 1, 2, 197, 64),
        (3, 1, 2, 197, 64),
        (2, 0, 2, 5, 32),
        (0, 2, 2, 5, 32),
    ],
    gated_relevancy: [
        *((C, 2, 2, 50, 32, 50 - prefix, 33, 77, 13) for C in (1, 3, 17) for prefix in (0, 1, 5)),
        (1, 1, 1, 5, 32, 4, 33, 100, 1, "paper"),
        (0, 2, 2, 6, 32, 5, 33, 77, 13),
        (2, 0, 2, 6, 32, 5, 33, 77, 13),
    ],
}
COMPILED = {  # the interpreter would take minutes for these shapes
    encode_topk: [
        (1, 33, 100, 1),
        (49, 33, 1000, 13, False),
        (196, 192, 2500, 128),
        (300, 768, 4096, 128),
        (257, 768, 1001, 13),
        (1370, 33, 501, 1),
    ],
    project: [(1, 33, 100, 1), (49, 33, 1000, 13), (197, 192, 300, 128), (5, 768, 50, 50), (1370, 33, 501, 13)],
    decode_topk: [(49, 33, 1000, 13), (197, 192, 300, 128), (5, 768, 50, 50), (1370, 33, 501, 13, False)],
    encode_project: [
        *((name, *sizes) for name in STREAMING for sizes in [(1, 33, 100), (49, 33, 501), (0, 33, 101)]),
        ("gated", 49, 192, 4999),
        ("relu", 1370, 33, 501),
        ("jumprelu", 197, 768, 1001),
    ],
    gate: [(1, 1370)],
    relevancy: [
        (1, 2, 2, 1, 64),
        (1, 1, 1, 5, 32),
        (2, 2, 1, 49, 128),
        (3, 2, 3, 50, 48, False, "paper"),
        (2, 2, 6, 197, 64),
        (17, 1, 2, 196, 64, False),
        (1, 1, 2, 257, 80, True, "paper"),
        (1, 1, 2, 1370, 32),
    ],
    gated_relevancy: [
        (1, 1, 1, 5, 32, 4, 33, 100, 1),
        (3, 2, 2, 50, 64, 49, 192, 301, 13, "paper"),
        (2, 1, 2, 197, 48, 196, 768, 1001, 128),
        (2, 2, 1, 49, 128, 49, 33, 100, 100),  # no prefix token
        (1, 1, 2, 257, 80, 252, 33, 50, 13),
        (1, 1, 1, 1370, 32, 1369, 33, 501, 13),
    ],
}
INTERPRETED_HALVES = [
    "encode_topk 5 192 501 13",
    "encode_topk 5 192 504 13",
    "project 49 192 300 13",
    "decode_topk 49 192 301 1",
    "encode_project relu 49 192 300",
    "encode_project gated 49 192 300",
    "gate 3 50",
    "relevancy 1 1 2 197 64",
    "relevancy 3 1 2 197 64",
    "gated_relevancy 1 2 2 50 32 49 33 77 13",
    "gated_relevancy 3 2 2 50 32 49 33 77 13",
]
OF = {many_gates: "gate", one_gate_for_all: "gate"}  # the op, if the builder has another name


def named(shapes):
    """``{"gate 7 49": ("gate", builder of its arguments)}``."""
    return {
        f"{build.__name__} {' '.join(map(str, sizes))}": (OF.get(build, build.__name__), partial(build, *sizes))
        for build, several in shapes.items()
        for sizes in several
    }


CASES = named(SHAPES) | ({} if INTERPRETED else named(COMPILED))
HALVES = (
    INTERPRETED_HALVES if INTERPRETED else [case for case in CASES if "1370" not in case]
)  # cases of half precision
TYPICAL = {  # one case per op, with several tokens, images and configurations
    "encode_topk": partial(encode_topk, 7, 33, 300, 13),
    "project": partial(project, 7, 33, 300, 13),
    "decode_topk": partial(decode_topk, 7, 33, 300, 13),
    "encode_project": partial(encode_project, "jumprelu", 7, 33, 300),
    "gate": partial(gate, 7, 49),
    "relevancy": partial(relevancy, 3, 2, 3, 50, 48, True, "paper"),
    "gated_relevancy": partial(gated_relevancy, 3, 2, 2, 50, 32, 49, 33, 301, 13),
}
if not INTERPRETED:
    TYPICAL |= {
        "encode_topk": partial(encode_topk, 49, 33, 1000, 13),
        "project": partial(project, 49, 33, 1000, 13),
        "decode_topk": partial(decode_topk, 49, 33, 1000, 13),
        "encode_project": partial(encode_project, "jumprelu", 49, 33, 1000),
    }

WIDE = {"relevancy": (0, 6), "gated_relevancy": (0, 10, 11)}  # the rows and their factors are at least float32


def each(arguments, change):
    """The arguments with each tensor replaced by ``change(position, tensor)``, also inside an activation."""

    def one(i, value):
        if isinstance(value, Activation):
            return value.map(lambda tensor: one(i, tensor))
        return change(i, value) if isinstance(value, torch.Tensor) else value

    return tuple(one(i, value) for i, value in enumerate(arguments))


def cast(op, arguments, dtype, device=DEVICE):
    """The arguments on ``device`` with floating tensors in ``dtype``; rows and gates are at least float32."""
    wide = torch.promote_types(dtype, torch.float32)

    def change(i, tensor):
        wanted = wide if i in WIDE.get(op, ()) else dtype
        return tensor.to(device, wanted if tensor.is_floating_point() else tensor.dtype)

    return each(arguments, change)


# Layouts: the same numbers, laid out so that a wrong stride reads memory that must not be read ------------------------


def unread(tensor, *shape):
    """Poisoned memory: NaN, or an index far out of range."""
    value = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3
    return torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)


def strided(_, tensor):
    """Every other element of a wider tensor."""
    view = unread(tensor, *tensor.shape, 2)[..., 0]
    return view.copy_(tensor)


def turned(_, tensor):
    """The last two dimensions swapped in memory."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def packed(_, tensor):
    """The layout of q, k and v in models: the second of three tensors [B, N, H, dh] in one."""
    if tensor.ndim != 4:
        return tensor
    B, H, N, dh = tensor.shape
    return unread(tensor, B, N, 3, H, dh)[:, :, 1].transpose(1, 2).copy_(tensor)


def expanded(_, tensor):
    """The last entry of the first dimension, repeated from the same memory; so the numbers differ."""
    return tensor[-1:].expand_as(tensor)


LAYOUTS = {"strided": strided, "turned": turned, "packed": packed}


def outputs(result):
    return result if isinstance(result, tuple) else (result,)
