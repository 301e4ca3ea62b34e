"""``SparseAutoencoder``: one class for all supported SAEs, with weights, an activation and a normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.reference.encode import (
    ACTIVATIONS,
    ALL_AT_ONCE,
    NORMALIZATIONS,
    Activation,
    Normalized,
    encode,
    normalize,
    widened,
)
from fastfg.reference.encode_topk import POSTS, RANKINGS, encode_groupmax, encode_topk, topk_lowest_index

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAY_BE_INFINITE = {"b_enc": -torch.inf, "threshold": torch.inf}  # either one switches a feature off
ACTIVATION_TENSORS = ("threshold", "r_mag", "b_gate", "b_mag")
INPUT_TENSORS = ("input_mean", "input_scale")
OPTIONAL_TENSORS = (*ACTIVATION_TENSORS, *INPUT_TENSORS)
TOKENS_AT_ONCE = 1024  # of which encode_sparse forms dense codes


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder over the residual stream: codes ``f`` and their dictionary.

    ``f = act((norm((x - input_mean) / input_scale) - b_dec) @ W_enc + b_enc)``, reconstruction ``f @ W_dec + b_dec``.
    Codes are ``>= 0``, except with ``post="none"``.

    Args:
        W_enc: [d, F], floating; all tensors have its dtype and are on its device.
        b_enc: [F].
        W_dec: [F, d], the dictionary, one feature per row.
        b_dec: [d].
        activation: ``topk`` (with ``k``), ``batch_topk`` (scalar ``threshold``), ``relu``, ``jumprelu``
            (``threshold`` [F]), ``gated`` (``r_mag``, ``b_gate``, ``b_mag``, each [F]), ``tanh_relu``, or
            ``groupmax`` (with ``k``: the largest of each of k runs of F / k neighbouring features).
        k: active features per token of a ``topk`` or ``groupmax`` SAE.
        normalize: ``none``, ``layer_norm`` (subtract the mean, divide by unbiased std + 1e-5) or
            ``constant_norm`` (times sqrt(d) / norm).
        subtract_b_dec: whether ``b_dec`` is subtracted from the normalised input before encoding.
        threshold, r_mag, b_gate, b_mag: parameters of the activations above.
        post: what a ``topk`` SAE applies to the pre-activations that it chooses: ``relu``, or ``none``, which keeps
            their sign.
        ranking: whether a ``topk`` SAE chooses by ``value`` or by ``magnitude``; the latter needs ``post="none"``.
        strict: whether a pre-activation must exceed its threshold to be active, and not just reach it.
        input_mean: [d], subtracted from ``x`` before everything else. None: nothing is.
        input_scale: a number or tensor [] > 0, by which ``x`` is then divided. None: 1.
        provenance: where the weights come from, a JSON object: see :func:`fastfg.load_saes`. It is saved with them.

    The weights do not require gradients. Raises ValueError or TypeError that names the wrong argument.

    >>> import torch, fastfg
    >>> W_dec = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    >>> sae = fastfg.SparseAutoencoder(W_dec.T, torch.zeros(64), W_dec, torch.zeros(16), k=8)
    >>> values, indices = sae.encode_sparse(torch.randn(5, 16))
    >>> values.shape
    torch.Size([5, 8])
    """

    W_enc: Tensor  # [d, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d]
    b_dec: Tensor  # [d]
    input_mean: Tensor | None  # [d]
    input_scale: Tensor | None  # []

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        activation: str = "topk",
        k: int | None = None,
        normalize: str = "none",
        subtract_b_dec: bool = True,
        *,
        threshold: Tensor | float | None = None,
        r_mag: Tensor | None = None,
        b_gate: Tensor | None = None,
        b_mag: Tensor | None = None,
        post: str = "relu",
        ranking: str = "value",
        strict: bool = True,
        input_mean: Tensor | None = None,
        input_scale: Tensor | float | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        tensors: dict[str, Tensor | None] = {
            **{"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec},
            **{"threshold": _tensor("threshold", threshold, W_enc), "r_mag": r_mag, "b_gate": b_gate, "b_mag": b_mag},
            **{"input_mean": input_mean, "input_scale": _tensor("input_scale", input_scale, W_enc)},
        }
        _check_tensors(tensors)
        _check_shapes(tensors)
        _check_options(activation, k, normalize, subtract_b_dec, tensors)
        _check_variant(activation, post, ranking, strict, tensors)
        check_finite(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.activation_name, self.k = activation, k
        self.normalization, self.subtract_b_dec = normalize, subtract_b_dec
        self.post, self.ranking, self.strict = post, ranking, strict
        self.provenance = dict(provenance or {})

    @property
    def d(self) -> int:
        """Width of the residual stream that this SAE reads."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Features in the dictionary."""
        return self.W_enc.shape[1]

    @property
    def activation(self) -> Activation:
        """The nonlinearity and its parameters, as the functions in ``fastfg.reference`` take them."""
        tensors = {name: getattr(self, name) for name in ACTIVATION_TENSORS}
        return Activation(
            self.activation_name, self.k, **tensors, post=self.post, ranking=self.ranking, strict=self.strict
        )

    @property
    def fixed_k(self) -> bool:
        """Whether every token has the same number ``k`` of codes."""
        return self.activation_name in ALL_AT_ONCE

    @property
    def subtracted(self) -> Tensor | None:
        """``b_dec`` if this SAE subtracts it from its input, else None."""
        return self.b_dec if self.subtract_b_dec else None

    def normalize(self, x: Tensor) -> Normalized:
        """The normalised ``x`` [..., d] in the SAE's dtype, with the scale and shift of each token.

        With ``input_mean``, the shift is [..., d]. An SAE in half precision normalises in float32, and its scale and
        shift are float32: residuals, their squares and 1e-5 may be too small or too large for half precision.
        """
        own = self.W_enc.dtype
        x = x.to(widened(self.b_dec).dtype)
        if self.input_mean is not None:
            x = x - self.input_mean
        if self.input_scale is not None:
            x = x / self.input_scale
        values, scale, shift = normalize(x, self.normalization)
        if self.input_scale is not None:
            scale, shift = scale * self.input_scale, shift * self.input_scale
        return Normalized(values.to(own), scale, shift if self.input_mean is None else shift + self.input_mean)

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes: ``x`` [..., d] -> [..., F]."""
        _check_width(x, self.d)
        return self._encode(self.normalize(x).values)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices of the active features: ``x`` [..., d] -> two tensors [..., K], largest value first.

        With ``ranking="magnitude"``, the largest magnitude is first; for ``groupmax``, the codes are in the order of
        the runs. ``K`` is ``k`` for SAEs that have one. For others it is the largest number of active features of any
        token; rows with fewer are padded with values of 0. No array [T, F] of all tokens is stored.
        """
        _check_width(x, self.d)
        chunks = self.normalize(x).values.flatten(0, -2).split(TOKENS_AT_ONCE)
        if self.fixed_k:
            parts = [self._encode_topk(tokens) for tokens in chunks]
        else:
            dense = [self._encode(chunks[0])] if len(chunks) == 1 else map(self._encode, chunks)  # one chunk: only once
            most = max(int((f != 0).sum(-1).max()) if f.numel() else 0 for f in dense)
            again = dense if isinstance(dense, list) else map(self._encode, chunks)
            parts = [topk_lowest_index(f, most) if most else (f[:, :0], f[:, :0].long()) for f in again]
        values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        return values.unflatten(0, x.shape[:-1]), indices.unflatten(0, x.shape[:-1])

    def _encode(self, normalized: Tensor) -> Tensor:
        return encode(normalized, self.W_enc, self.b_enc, self.subtracted, self.activation)

    def _encode_topk(self, normalized: Tensor) -> tuple[Tensor, Tensor]:
        assert self.k is not None
        weights = self.W_enc, self.b_enc, self.subtracted, self.k
        if self.activation_name == "groupmax":
            return encode_groupmax(normalized, *weights)
        return encode_topk(normalized, *weights, self.post, self.ranking)

    def decode(self, codes: Tensor, like: Normalized | None = None) -> Tensor:
        """Reconstruction [..., d] of dense codes [..., F], in the normalised space.

        With ``like``, a result of :meth:`normalize`, it is scaled and shifted back to the residual stream, and float32
        if the SAE is in half precision.
        """
        decoded = codes @ self.W_dec + self.b_dec
        return decoded if like is None else decoded * like.scale + like.shift

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``x`` [..., d], at its own scale.

        It has the SAE's dtype, or float32 for an SAE in half precision and an ``x`` of another dtype.
        """
        restored = self.decode(self.encode(x), self.normalize(x))
        return restored.to(self.W_enc.dtype) if x.dtype == self.W_enc.dtype else restored

    def config(self) -> dict[str, Any]:
        """The config that :meth:`save` writes with the tensors."""
        return {
            "activation": self.activation_name,
            "k": self.k,
            "normalize": self.normalization,
            "subtract_b_dec": self.subtract_b_dec,
            "post": self.post,
            "ranking": self.ranking,
            "strict": self.strict,
            "d": self.d,
            "n_features": self.n_features,
            **({"provenance": self.provenance} if self.provenance else {}),
        }

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``sae.safetensors`` into ``folder``, which is created if it does not exist."""
        from fastfg.sae.formats import own

        own.write(self, Path(folder))

    @classmethod
    def load(cls, path: str | Path) -> SparseAutoencoder:
        """Read one SAE from a folder or file in any format that fastfg knows; pickled code is never run."""
        from fastfg.sae.checkpoints import load_sae

        return load_sae(path)

    def extra_repr(self) -> str:
        k = f", k={self.k}" if self.k is not None else ""
        return f"d={self.d}, F={self.n_features}, {self.activation_name}{k}, normalize={self.normalization!r}"


def _tensor(name: str, value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """A number as a tensor [] like the weights."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected a tensor or a number, got {value}")
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    return value


def _check_variant(
    activation: str, post: str, ranking: str, strict: bool, tensors: Mapping[str, Tensor | None]
) -> None:
    for name, value, known in (("post", post, POSTS), ("ranking", ranking, RANKINGS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected True or False, got {strict!r}")
    if post == "none" and activation != "topk":
        raise ValueError(f"post: expected relu for a {activation} SAE, got none")
    if ranking == "magnitude" and (activation != "topk" or post != "none"):
        raise ValueError("ranking: expected value, except for a topk SAE with post='none', got magnitude")
    if not strict and activation not in ("jumprelu", "batch_topk"):
        raise ValueError(f"strict: expected True for a {activation} SAE, got False")
    scale = tensors["input_scale"]
    if scale is not None and not scale.is_meta and not bool(scale > 0):
        raise ValueError(f"input_scale: expected a number > 0, got {float(scale):g}")


def _check_width(x: Tensor, d: int) -> None:
    if x.shape[-1] != d:
        raise ValueError(f"x: expected [..., {d}] for this SAE, got {list(x.shape)}")


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    """Require floating tensors with the same dtype and device."""
    first = tensors["W_enc"]
    for name, tensor in tensors.items():
        if tensor is None and name in OPTIONAL_TENSORS:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        assert first is not None
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise TypeError(
                f"{name}: expected a dense tensor of float16, bfloat16, float32 or float64, got {tensor.dtype} "
                f"({tensor.layout})"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name}: expected {first.dtype} on {first.device}, as W_enc, got {tensor.dtype} on {tensor.device}"
            )


def check_finite(tensors: Mapping[str, Tensor | None]) -> None:
    """Require finite weights. A bias of -inf or a threshold of inf is allowed: it switches a feature off."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_meta:
            continue
        finite = tensor.isfinite()
        if name in MAY_BE_INFINITE:
            finite |= tensor == MAY_BE_INFINITE[name]
        if not bool(finite.all()):
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity")


def _check_shapes(tensors: dict[str, Tensor | None]) -> None:
    W_enc = tensors["W_enc"]
    assert W_enc is not None
    if W_enc.ndim != 2:
        raise ValueError(f"W_enc: expected [d, F], got {list(W_enc.shape)}")
    d, F = W_enc.shape
    expected = {"b_enc": [F], "W_dec": [F, d], "b_dec": [d], "r_mag": [F], "b_gate": [F], "b_mag": [F]}
    expected |= {"input_mean": [d], "input_scale": []}
    for name, tensor in tensors.items():
        if tensor is not None and name in expected and list(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: expected {expected[name]} for W_enc [{d}, {F}], got {list(tensor.shape)}")


def _check_options(
    activation: str, k: int | None, normalize: str, subtract_b_dec: bool, tensors: dict[str, Tensor | None]
) -> None:
    b_enc, threshold = tensors["b_enc"], tensors["threshold"]
    assert b_enc is not None
    F = len(b_enc)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {NORMALIZATIONS}, got {normalize!r}")
    if not isinstance(subtract_b_dec, bool):
        raise TypeError(f"subtract_b_dec: expected True or False, got {subtract_b_dec!r}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k: expected an int, got {k!r}")
    if activation in ALL_AT_ONCE and (k is None or not 1 <= k <= F):
        raise ValueError(f"k: expected 1 to {F} for a {activation} SAE, got {k}")
    if activation == "groupmax" and k is not None and F % k:
        raise ValueError(f"k: expected a divisor of F={F} for a groupmax SAE, got {k}")
    needed = {"batch_topk": ["threshold"], "jumprelu": ["threshold"], "gated": ["r_mag", "b_gate", "b_mag"]}
    for name in needed.get(activation, []):
        if tensors[name] is None:
            raise ValueError(f"{name}: expected a tensor for a {activation} SAE, got None")
    shape = [F] if activation == "jumprelu" else []
    if threshold is not None and list(threshold.shape) != shape:
        raise ValueError(f"threshold: expected {shape} for a {activation} SAE, got {list(threshold.shape)}")
    if activation not in ALL_AT_ONCE and k is not None:
        raise ValueError(f"k: expected None for a {activation} SAE, got {k}")
