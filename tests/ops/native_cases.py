"""Random arguments for the native ops, by name and in the order of their schemas, of any size including zero."""

from __future__ import annotations

import importlib
import random

import torch

from fastfg import reference
from fastfg.reference.encode import Activation

importlib.import_module("fastfg._C")  # registers torch.ops.fastfg; tests of an extension that is missing fail

STREAMING = ("relu", "tanh_relu", "jumprelu", "batch_topk", "gated")


class Draw:
    """Random sizes and numbers from one seed."""

    def __init__(self, seed, dtype=torch.float32):
        self.sizes, self.numbers, self.dtype = random.Random(seed), torch.Generator().manual_seed(seed), dtype

    def size(self, low, high):
        """A size between the bounds, often the lower one."""
        return low if self.sizes.random() < 0.15 else self.sizes.randint(low, high)

    def choice(self, options):
        return self.sizes.choice(options)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.numbers, dtype=torch.float64).to(self.dtype)

    def integers(self, high, *shape):
        return torch.randint(0, max(1, high), shape, generator=self.numbers)


def encode_topk(draw):
    T, d, F = draw.size(0, 40), draw.size(0, 70), draw.size(1, 700)
    b_dec = draw.choice([None, draw.randn(d)])
    W_enc = draw.randn(d, F) / max(1, d) ** 0.5
    return {"x": draw.randn(T, d), "W_enc": W_enc, "b_enc": draw.randn(F), "b_dec": b_dec, "k": draw.size(1, F)}


def encode_project(draw):
    T, d, F, name = draw.size(0, 40), draw.size(0, 70), draw.size(0, 700), draw.choice(STREAMING)
    scale = max(1, d) ** 0.5
    matrices = {"W_enc": draw.randn(d, F) / scale, "b_enc": draw.randn(F), "W_dec": draw.randn(F, d) / scale}
    of = {"jumprelu": ("threshold",), "batch_topk": ("threshold",), "gated": ("r_mag", "b_gate", "b_mag")}
    parameters = dict.fromkeys(("threshold", "r_mag", "b_gate", "b_mag"))
    for parameter in of.get(name, ()):
        parameters[parameter] = draw.randn(F) if name != "batch_topk" else draw.randn(1)[0].abs()
    return {"x": draw.randn(T, d), "g": draw.randn(T, d), **matrices, "activation": name, **parameters}


def gate(draw):
    rows, P = draw.size(0, 9), draw.size(1, 300)
    kappa, c_max = 0.2 + draw.randn(rows).abs(), 1 + 10 * draw.randn(rows).abs()
    return {"scores": draw.randn(rows, P), "kappa": kappa, "c_max": c_max}


def project(draw):
    T, d, F = draw.size(0, 40), draw.size(0, 70), draw.size(1, 300)
    K = draw.size(0, F)
    return {
        "g": draw.randn(T, d),
        "W_dec": draw.randn(F, d),
        "values": draw.randn(T, K),
        "indices": draw.integers(F, T, K),
    }


def decode_topk(draw):
    given = project(draw)
    codes = {"values": given["values"], "indices": given["indices"], "W_dec": given["W_dec"]}
    return codes | {"b_dec": draw.choice([None, draw.randn(given["W_dec"].shape[1])])}


def relevancy(draw):
    C, B, H, N, dh = draw.size(0, 4), draw.size(0, 3), draw.size(1, 3), draw.size(0, 70), draw.size(0, 40)
    attention = {name: draw.randn(B, H, N, dh) for name in ("q", "k", "v", "dO")}
    gates = draw.choice([None, draw.randn(C, B, N).abs()])
    scale = draw.choice([dh**-0.5 if dh else 1.0, -0.3, 0.0])
    return {
        "rows": draw.randn(C, B, N),
        **attention,
        "scale": scale,
        "gates": gates,
        "paper": draw.choice([True, False]),
    }


def gated_relevancy(draw):
    C, B, H, N, dh = draw.size(1, 4), draw.size(0, 3), draw.size(1, 3), draw.size(1, 70), draw.size(0, 40)
    P, d, F = draw.size(1, N), draw.size(0, 50), draw.size(1, 99)
    K = draw.size(0, 20)
    attention = {name: draw.randn(B, H, N, dh) for name in ("q", "k", "v", "dO")}
    codes = {"values": draw.randn(B, P, K), "indices": draw.integers(F, B, P, K)}
    gates = {"kappa": 0.2 + draw.randn(C).abs(), "c_max": (1 + 10 * draw.randn(C)).clamp(min=1)}
    block = {
        "rows": draw.randn(C, B, N),
        **attention,
        "scale": 0.2,
        "g": draw.randn(B, P, d),
        "W_dec": draw.randn(F, d),
    }
    return {**block, **codes, **gates, "paper": draw.choice([True, False])}


BUILD = {
    "decode_topk": decode_topk,
    "encode_project": encode_project,
    "encode_topk": encode_topk,
    "gate": gate,
    "gated_relevancy": gated_relevancy,
    "project": project,
    "relevancy": relevancy,
}


def run(op, arguments):
    """The native op's results, as a tuple."""
    result = getattr(torch.ops.fastfg, op)(*arguments.values())
    return result if isinstance(result, tuple) else (result,)


def judge(op, arguments):
    """The reference's results on the same values in float64, as a tuple."""
    given = {name: value.double() if is_float(value) else value for name, value in arguments.items()}
    if op == "gate":
        given = {**given, "kappa": given["kappa"][:, None], "c_max": given["c_max"][:, None]}
    if op == "encode_project":
        *tensors, name, threshold, r_mag, b_gate, b_mag = given.values()
        given = dict(enumerate([*tensors, Activation(name, None, threshold, r_mag, b_gate, b_mag)]))
    if "paper" in given:
        given["paper"] = "paper" if given["paper"] else "transmm"
    result = getattr(reference, op)(*given.values())
    return result if isinstance(result, tuple) else (result,)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()
