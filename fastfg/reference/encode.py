"""Dense codes of an SAE: ``f = act((norm(x) - b_dec) @ W_enc + b_enc)``; ``f >= 0``, except with ``post="none"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfg.reference.encode_topk import dense, groupmax_lowest_index, post_activate, topk_ranked

ACTIVATIONS = ("topk", "batch_topk", "relu", "jumprelu", "gated", "tanh_relu", "groupmax")
ALL_AT_ONCE = ("topk", "groupmax")  # activations that compare features; the others act on each feature alone
NORMALIZATIONS = ("none", "layer_norm", "constant_norm")
LAYER_NORM_EPS = 1e-5  # added to the standard deviation, outside the square root


@dataclass(frozen=True)
class Activation:
    """An SAE's nonlinearity and its parameters.

    ``topk`` and ``groupmax`` need ``k``, ``batch_topk`` a scalar ``threshold``, and ``jumprelu`` a ``threshold`` [F].
    ``gated`` needs ``r_mag``, ``b_gate`` and ``b_mag``, each [F]; it has no ``b_enc``. ``relu`` and ``tanh_relu`` need
    nothing. For ``topk``, ``post`` (``relu`` or ``none``) is applied to the chosen pre-activations, which rank by
    ``value`` or by ``magnitude``. A ``strict`` threshold is one that a pre-activation must exceed, not just reach.
    """

    name: str
    k: int | None = None
    threshold: Tensor | None = None  # [] or [F]
    r_mag: Tensor | None = None  # [F]
    b_gate: Tensor | None = None  # [F]
    b_mag: Tensor | None = None  # [F]
    post: str = "relu"
    ranking: str = "value"
    strict: bool = True

    def slice(self, start: int, stop: int) -> Activation:
        """The same activation for the features ``start:stop``. Not for those of ``ALL_AT_ONCE``."""
        return self.map(lambda t: t[start:stop] if t.ndim else t)

    def map(self, change: Callable[[Tensor], Tensor]) -> Activation:
        """The same activation with ``change`` applied to each of its tensors."""
        tensors = {name: getattr(self, name) for name in ("threshold", "r_mag", "b_gate", "b_mag")}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if t is not None}
        return replace(self, **changed)


class Normalized(NamedTuple):
    """``x = values * scale + shift``, with one scale and one shift per token, [..., 1]."""

    values: Tensor
    scale: Tensor
    shift: Tensor


def widened(t: Tensor) -> Tensor:
    """``t`` in float32 if it is of half precision, whose sums and small numbers lose too much."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def normalize(x: Tensor, kind: str) -> Normalized:
    """Normalise ``x`` [..., d] as the SAE's input.

    ``layer_norm`` subtracts the mean and divides by (unbiased standard deviation + 1e-5); ``constant_norm``
    multiplies by ``sqrt(d) / norm``. The scale of a layer-norm SAE is the standard deviation itself.
    """
    if kind == "none":
        return Normalized(x, torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1]))
    if kind == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return Normalized((x - mean) / (std + LAYER_NORM_EPS), std, mean)
    if kind == "constant_norm":
        norm, root = x.norm(dim=-1, keepdim=True), x.shape[-1] ** 0.5
        return Normalized(x * (root / norm), norm / root, torch.zeros_like(norm))
    raise ValueError(f"normalize: expected one of {NORMALIZATIONS}, got {kind!r}")


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """``(x - b_dec) @ W_enc + b_enc`` [..., F]; ``b_dec`` is None for an SAE that does not subtract it.

    The product is computed in the encoder's dtype, even if ``b_dec`` has another one.
    """
    centred = x if b_dec is None else x - b_dec
    return centred.to(W_enc.dtype) @ W_enc + b_enc


def activate(pre: Tensor, activation: Activation) -> Tensor:
    """The codes of pre-activations [..., F]. For ``gated``, pre-activations are ``(x - b_dec) @ W_enc``, without bias.

    A code is 0 where the pre-activation is at most the threshold (below it, if the threshold is not strict). This
    comparison is false for NaN, so NaN stays NaN.
    """
    kind = activation
    if kind.name == "relu":
        return pre.relu()
    if kind.name == "tanh_relu":
        return pre.relu().tanh()
    if kind.name in ("jumprelu", "batch_topk"):
        assert kind.threshold is not None
        threshold = kind.threshold.to(pre)
        return torch.where(pre <= threshold if kind.strict else pre < threshold, 0.0, pre).relu()
    if kind.name == "gated":
        assert kind.r_mag is not None and kind.b_gate is not None and kind.b_mag is not None
        magnitude = (pre * kind.r_mag.to(pre).exp() + kind.b_mag.to(pre)).relu()
        return torch.where(pre + kind.b_gate.to(pre) <= 0, 0.0, magnitude)
    if kind.name == "topk":
        assert kind.k is not None
        values, indices = topk_ranked(pre, kind.k, kind.ranking)
        return dense(post_activate(values, kind.post), indices, pre)
    if kind.name == "groupmax":
        assert kind.k is not None
        return dense(*groupmax_lowest_index(pre, kind.k), pre)
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {kind.name!r}")


def encode(
    x: Tensor,  # [..., d], already normalised
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    b_dec: Tensor | None,  # [d], None: not subtracted
    activation: Activation,
) -> Tensor:
    """Dense codes ``f`` [..., F] of any SAE."""
    if activation.name == "gated":
        b_enc = torch.zeros_like(b_enc)
    return activate(preactivations(x, W_enc, b_enc, b_dec), activation)
