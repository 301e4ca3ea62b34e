"""Each op as torch knows it, the same for every backend: what it takes, and what comes back.

The reference takes an ``Activation``, numbers that broadcast and the name of an identity; a torch op takes tensors and
plain values. :func:`call` goes from the one to the other, :func:`as_reference` back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfg.reference.encode import Activation

# The results without their numbers: a signature is the op's schema, a body its fake for tracing ---------------------


def _encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _encode_project(
    x: Tensor,
    g: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    activation: str,
    threshold: Tensor | None,
    r_mag: Tensor | None,
    b_gate: Tensor | None,
    b_mag: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0])


def _gate(scores: Tensor, kappa: Tensor, c_max: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


def _gated_relevancy(
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dO: Tensor,
    scale: float,
    g: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
    kappa: Tensor,
    c_max: Tensor,
    paper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (C, _, _), (B, P, _) = rows.shape, g.shape
    return rows.new_empty(rows.shape), rows.new_empty(B, P), rows.new_empty(C, B, P)


def _project(g: Tensor, W_dec: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape[0]), g.new_empty(values.shape)


def _relevancy(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float, gates: Tensor | None, paper: bool
) -> Tensor:
    return rows.new_empty(rows.shape)


FAKES: dict[str, Callable[..., Any]] = {
    "encode_project": _encode_project,
    "encode_topk": _encode_topk,
    "gate": _gate,
    "gated_relevancy": _gated_relevancy,
    "project": _project,
    "relevancy": _relevancy,
}


def schema(op: str) -> str:
    """``op``'s schema in torch's words, as in ``gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor``."""
    return op + torch.library.infer_schema(FAKES[op], mutates_args=()).replace("SymInt", "int")


# From the reference's arguments to the torch op's, and back ---------------------------------------------------------


def call(op: str, torch_op: Callable[..., Any], *arguments: Any) -> Any:
    """``torch_op``, which has ``op``'s schema, on the arguments of ``op``'s reference."""
    if op == "gate":
        return _call_gate(torch_op, *arguments)
    if op == "encode_project":
        *tensors, a = arguments
        return torch_op(*tensors, a.name, a.threshold, a.r_mag, a.b_gate, a.b_mag)
    if op in ("relevancy", "gated_relevancy"):
        *others, identity = arguments
        return torch_op(*others, identity == "paper")
    return torch_op(*arguments)


def _call_gate(torch_op: Callable[..., Tensor], scores: Tensor, *numbers: float | Tensor) -> Tensor:
    """As rows [R, P] with two numbers each, in float32 at least."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    tensors = [n.to(wide) if isinstance(n, Tensor) else wide.new_full((1,), n) for n in numbers]
    each, *tensors = torch.broadcast_tensors(wide.narrow(-1, 0, 1), *tensors)
    rows = wide.expand(*each.shape[:-1], -1)
    gates = torch_op(rows.reshape(-1, rows.shape[-1]), *(t.reshape(-1) for t in tensors))
    return gates.reshape(rows.shape).to(scores.dtype)


def as_reference(op: str, *arguments: Any) -> tuple[Any, ...]:
    """The arguments of ``op``'s reference for those of the torch op."""
    if op == "gate":
        scores, kappa, c_max = arguments
        return scores, kappa[:, None], c_max[:, None]
    if op == "encode_project":
        *tensors, name, threshold, r_mag, b_gate, b_mag = arguments
        return *tensors, Activation(name, None, threshold, r_mag, b_gate, b_mag)
    if op in ("relevancy", "gated_relevancy"):
        *others, paper = arguments
        return *others, "paper" if paper else "transmm"
    return arguments
