"""The C++ ops, where they were built: each with the signature of its reference, and a fake for tracing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfg.reference.encode import Activation


@functools.cache
def why_not() -> str | None:
    """None where the native ops are there, else the reason."""
    try:
        importlib.import_module("fastfg._C")  # registers torch.ops.fastfg
    except ImportError as error:
        return f"fastfg._C is not built or does not load ({error}); see FASTFG_BUILD in setup.py"
    _register_fakes()
    return None


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return torch.ops.fastfg.encode_topk(x, W_enc, b_enc, b_dec, k)


def project(g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return torch.ops.fastfg.project(g, W_dec, values, indices)


def encode_project(x: Tensor, g: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, activation: Activation) -> Tensor:
    a = activation
    return torch.ops.fastfg.encode_project(x, g, W_enc, b_enc, W_dec, a.name, a.threshold, a.r_mag, a.b_gate, a.b_mag)


def gate(scores: Tensor, kappa: float | Tensor, c_max: float | Tensor) -> Tensor:
    rows = scores.flatten(0, -2) if scores.ndim > 1 else scores.unsqueeze(0)

    def a_row(value: float | Tensor) -> Tensor:
        whole = torch.as_tensor(value, dtype=scores.dtype, device=scores.device)
        return whole.expand(*scores.shape[:-1], 1).reshape(len(rows))

    return torch.ops.fastfg.gate(rows, a_row(kappa), a_row(c_max)).reshape(scores.shape)


def relevancy(
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dO: Tensor,
    scale: float,
    gates: Tensor | None = None,
    identity: str = "transmm",
) -> Tensor:
    return torch.ops.fastfg.relevancy(rows, q, k, v, dO, scale, gates, identity == "paper")


def _register_fakes() -> None:
    def fake_encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> Any:
        return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)

    fakes: dict[str, Callable[..., Any]] = {
        "encode_topk": fake_encode_topk,
        "project": lambda g, W_dec, values, indices: g.new_empty(g.shape[0]),
        "encode_project": lambda x, *_: x.new_empty(x.shape[0]),
        "gate": lambda scores, kappa, c_max: torch.empty_like(scores),
        "relevancy": lambda rows, *_: torch.empty_like(rows),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"fastfg::{name}", fake)
