"""Overcomplete: the state dict of an SAE. It has no ``b_dec``, and does not say its k, its threshold or its row norm.

The dictionary is its stored rows, normalised (``row_norm``), times ``exp(multiplier)``, or an archetypal one: convex
combinations of points, plus a relaxation whose rows are clipped to ``delta``. A BatchNorm over the features is folded.
A LayerNorm over them can't be, and deeper encoders, matching pursuit and quantised codes are not one encoder product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.files.stored import Stored
from fastfg.sae.formats import folding
from fastfg.sae.formats.common import Contents, Given, build, like
from fastfg.sae.model import SparseAutoencoder

NAME = "Overcomplete"
FILES = "Overcomplete: a state dict"
LINEAR, NORM = "encoder.final_block.0.", "encoder.final_block.1."
ROW_EPS = 1e-8
ROW_NORMS = ("l2", "max_l2", "l1", "max_l1", "identity")
UNUSED = (f"{NORM}num_batches_tracked",)
SAME = "k (TopK), threshold (BatchTopK) or activation='relu' tells them apart: their tensors are the same"


def matches(contents: Contents) -> bool:
    names = {name.removeprefix("module.") for name in contents.keys}
    return contents.kind == "torch" and bool({"dictionary._weights", "dictionary.C"} & names)


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    state = {name.removeprefix("module."): value for name, value in contents.mapping().items()}
    deeper = sorted(name for name in state if name.startswith("encoder.") and ".mlp_blocks." in name)
    if deeper:
        raise ValueError(
            f"path: expected an encoder of one linear map in {contents.file}, got a deeper one ({deeper[0]})"
        )
    if f"{NORM}weight" in state and f"{NORM}running_mean" not in state:
        raise ValueError(f"path: expected an encoder without LayerNorm over the features in {contents.file}, got one")
    W_dec, dictionary, folded = _dictionary(contents, state, given)
    weights, rest = _encoder(contents, state, W_dec, folded)
    jump = ("thresholds",) if "thresholds" in state else ()
    contents.pick(state, (), (*dictionary, *rest, *jump), UNUSED)
    thresholds = contents.tensor(state, "thresholds") if jump else None
    return build(
        contents, given, NAME,
        site=None,
        folded=folded,
        subtract_b_dec=False,
        b_dec=torch.zeros(W_dec.shape[1], dtype=W_dec.dtype),
        W_dec=W_dec,
        **weights,
        **_activation(given, thresholds, W_dec),
    )  # fmt: skip


def _dictionary(
    contents: Contents, state: Mapping[str, Any], given: Given
) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """The decoder, the names of the tensors that it is made of, and what was folded into it."""
    scale = contents.tensor(state, "dictionary.multiplier").double().exp()
    folded = ["multiplier"] if float(scale) != 1 else []
    if "dictionary._weights" in state:
        rows = contents.tensor(state, "dictionary._weights")
        if rows.ndim != 2:
            raise ValueError(f"path: expected [F, d] in {contents.file}, got {list(rows.shape)}")
        name = given.need("row_norm", f"its files do not say how rows are normalised (one of {ROW_NORMS})")
        W_dec = (_normalized(rows.double(), name) * scale).to(rows.dtype)
        folded += [] if name == "identity" else [f"row_norm {name}"]
        return W_dec, ("dictionary._weights", "dictionary.multiplier"), folded
    names = ("dictionary.C", "dictionary.W", "dictionary.Relax")
    points, W, relax = (contents.tensor(state, name) for name in names)
    delta = float(
        given.need("delta", "an archetypal dictionary does not save the norm that its relaxation is clipped to")
    )
    weights = W.double().relu()
    weights = weights / (weights.sum(-1, keepdim=True) + ROW_EPS)
    norms = relax.double().norm(dim=-1, keepdim=True)
    clipped = relax.double() * torch.where(norms > 0, delta / norms, 1.0).clamp(max=1)
    W_dec = ((weights @ points.double() + clipped) * scale).to(W.dtype)
    return W_dec, (*names, "dictionary.multiplier"), [*folded, "archetypal"]


def _normalized(rows: Tensor, name: str) -> Tensor:
    if name not in ROW_NORMS:
        raise ValueError(f"row_norm: expected one of {ROW_NORMS}, got {name!r}")
    if name == "identity":
        return rows
    norms = rows.norm(p=1 if name.endswith("l1") else 2, dim=1, keepdim=True)
    return rows / norms.max() if name.startswith("max") else rows / (norms + ROW_EPS)


def _encoder(
    contents: Contents, state: Mapping[str, Any], W_dec: Tensor, folded: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The encoder, and the names of the tensors that it is made of. A tied one is the decoder's transpose."""
    if isinstance(state.get(f"{LINEAR}weight"), Stored):
        names = [f"{LINEAR}weight", f"{LINEAR}bias"]
    else:
        names = [name for name in ("encoder.weight", "encoder.bias") if name in state]
    if names and names[0].endswith("weight"):
        W_enc = contents.tensor(state, names[0]).T.contiguous()
    else:
        W_enc = W_dec.T.contiguous()
        folded.append("tied encoder")
    bias = [name for name in names if name.endswith("bias") and name in state]
    b_enc = contents.tensor(state, bias[0]) if bias else torch.zeros(W_dec.shape[0], dtype=W_dec.dtype)
    norm = {name.removeprefix(NORM): name for name in state if name.startswith(NORM) and name not in UNUSED}
    if norm:
        tensors = {short: contents.tensor(state, name) for short, name in norm.items()}
        W_enc, b_enc = folding.batch_norm(W_enc, b_enc, tensors)
        folded.append("batch_norm")
    return {"W_enc": W_enc, "b_enc": b_enc}, [*names, *norm.values()]


def _activation(given: Given, thresholds: Tensor | None, weights: Tensor) -> dict[str, Any]:
    """A code that reaches its threshold is kept."""
    if thresholds is not None:
        return {"activation": "jumprelu", "threshold": thresholds.exp(), "strict": False}
    k, threshold, name = given.may("k"), given.may("threshold"), given.may("activation")
    if [k, threshold, name].count(None) != 2 or name not in (None, "relu"):
        raise ValueError(
            f"activation: expected one of k, threshold and activation to be given for {given.file}, because {SAME}"
        )
    if name is not None:
        return {"activation": "relu"}
    if k is not None:
        return {"activation": "topk", "k": k}
    return {"activation": "batch_topk", "threshold": like(threshold, weights), "strict": False}
