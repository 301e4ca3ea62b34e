"""dictionary_learning: a state dict (``ae.pt``) and ``config.json``, and the fork sae-for-vlm.

The names of the tensors tell the classes apart, except TopK and BatchTopK, which only ``dict_class`` in the config (or
``activation``) tells apart. The scale of the input is folded when the files are written. sae-for-vlm names neither
layer nor site, and was made for class tokens.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.formats.common import Config, Contents, Given, build, like, scalar, standard, transposed
from fastfg.sae.model import SparseAutoencoder

NAME = "dictionary_learning"
FILES = "dictionary_learning: ae.pt + config.json"
PLAIN = {"bias", "encoder.weight", "encoder.bias", "decoder.weight"}  # AutoEncoder
NEW = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}  # AutoEncoderNew
GATED = {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"}
LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"}  # AutoEncoderTopK, BatchTopKSAE
MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec"}  # JumpReluAutoEncoder, MatryoshkaBatchTopKSAE
BUFFERS = {"k", "threshold"}
BACKUP = {"step", "ae", "optimizer"}
CLASSES = {
    "AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk", "MatryoshkaBatchTopKSAE": "batch_topk",
    "MatroyshkaBatchTopKSAE": "batch_topk", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
FORK = "MatroyshkaBatchTopKSAE"  # sae-for-vlm's spelling
POINT = re.compile(r"resid_post(?:_layer_(\d+))?")


def matches(contents: Contents) -> bool:
    if contents.kind != "torch":
        return False
    keys = contents.keys
    if keys >= BACKUP or any(keys == names for names in (PLAIN, NEW, GATED)):
        return True
    if keys - BUFFERS == LINEAR:
        return True
    known = contents.config("trainer") is not None or "group_sizes" in keys
    return known and keys - BUFFERS - {"group_sizes"} == MATRICES


def block(contents: Contents) -> int | None:
    layer = _trainer(contents).get("layer")
    return layer if type(layer) is int and layer >= 0 else None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    if contents.keys >= BACKUP:
        raise ValueError(f"path: expected a finished SAE in {contents.file}, got a backup of an unfinished run")
    trainer, keys = _trainer(contents), contents.keys
    if keys == PLAIN:
        weights = _relu(contents, "bias", True)
    elif keys == NEW:
        weights = _relu(contents, "decoder.bias", False)
    elif keys == GATED:
        weights = _gated(contents)
    else:
        weights = _thresholded(contents, trainer, given)
    if trainer.get("dict_class") == FORK:
        given.need("tokens", "it comes from sae-for-vlm, which trains on class tokens unless told otherwise")
    return build(
        contents, given, NAME,
        site=_site(trainer, contents),
        layer=block(contents),
        model=trainer.get("lm_name") or None,
        **weights,
    )  # fmt: skip


def _trainer(contents: Contents) -> Config:
    config = contents.config("trainer")
    return Config({}, contents.file) if config is None else config.inner("trainer")


def _site(trainer: Config, contents: Contents) -> str | None:
    """The site that ``submodule_name`` says; sae-for-vlm leaves it empty."""
    config = contents.config("buffer")
    if config is not None and config.inner("buffer").get("io") == "in":
        return "the input of a module"
    name = trainer.get("submodule_name")
    if not isinstance(name, str) or not name:
        return None
    return "resid_post" if POINT.fullmatch(name) else name


def _relu(contents: Contents, bias: str, subtract: bool) -> dict[str, Any]:
    picked = contents.pick(contents.mapping(), ("encoder.weight", "encoder.bias", "decoder.weight", bias))
    return {
        "W_enc": transposed(picked, "encoder.weight", contents),
        "b_enc": picked["encoder.bias"],
        "W_dec": transposed(picked, "decoder.weight", contents),
        "b_dec": picked[bias],
        "activation": "relu",
        "subtract_b_dec": subtract,
    }


def _gated(contents: Contents) -> dict[str, Any]:
    picked = contents.pick(contents.mapping(), GATED)
    return {
        "W_enc": transposed(picked, "encoder.weight", contents),
        "b_enc": torch.zeros_like(picked["gate_bias"]),
        "W_dec": transposed(picked, "decoder.weight", contents),
        "b_dec": picked["decoder_bias"],
        "activation": "gated",
        "subtract_b_dec": True,
        "r_mag": picked["r_mag"],
        "b_gate": picked["gate_bias"],
        "b_mag": picked["mag_bias"],
    }


def _thresholded(contents: Contents, trainer: Config, given: Given) -> dict[str, Any]:
    """TopK, BatchTopK, Matryoshka and JumpReLU, which have thresholds, or k, in the file or in the config."""
    state = contents.mapping()
    linear = "encoder.weight" in state
    kind = _kind(contents, trainer, given)
    names = LINEAR if linear else MATRICES
    picked = contents.pick(state, names, ("threshold",) if kind != "topk" else (), ("k", "threshold", "group_sizes"))
    weights = _linear(picked, contents) if linear else standard(picked)
    if kind == "topk":
        said = contents.integer(state, "k")
        k = given.agree("k", trainer.optional("k", int) if said is None else said)
        return weights | {"activation": "topk", "k": k, "subtract_b_dec": True}
    said_threshold = picked.get("threshold")
    if kind == "jumprelu":
        if said_threshold is None:
            raise ValueError(f"path: expected threshold in {contents.file}, got {sorted(state)}")
        subtract = given.need("subtract_b_dec", "a JumpReluAutoEncoder does not save it (its default is False)")
        return weights | {"activation": kind, "threshold": said_threshold, "subtract_b_dec": subtract}
    threshold = given.need("threshold") if said_threshold is None else scalar(said_threshold, weights["W_enc"])
    return weights | {
        "activation": kind, "threshold": like(threshold, weights["W_enc"]), "subtract_b_dec": True,
    }  # fmt: skip


def _linear(picked: dict[str, Tensor], contents: Contents) -> dict[str, Any]:
    return {
        "W_enc": transposed(picked, "encoder.weight", contents),
        "b_enc": picked["encoder.bias"],
        "W_dec": transposed(picked, "decoder.weight", contents),
        "b_dec": picked["b_dec"],
    }


def _kind(contents: Contents, trainer: Config, given: Given) -> str:
    name = trainer.get("dict_class")
    if name is not None and name not in CLASSES:
        raise ValueError(f"dict_class: expected one of {sorted(CLASSES)} in {contents.file}, got {name!r}")
    said = CLASSES[name] if name is not None else None
    if said is None and "group_sizes" in contents.keys:
        said = "batch_topk"
    kind = given.agree("activation", said, "TopK and BatchTopK SAEs have the same tensors")
    if kind not in ("topk", "batch_topk", "jumprelu"):
        raise ValueError(f"activation: expected topk, batch_topk or jumprelu for {contents.file}, got {kind!r}")
    return str(kind)
