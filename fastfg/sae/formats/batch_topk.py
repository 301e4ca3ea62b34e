"""The BatchTopK reference (bartbussmann): a state dict and ``config.json`` with ``sae_type``.

TopK and BatchTopK leave out ``b_enc``, unless the config's ``use_encoder_bias`` says otherwise. ``input_unit_norm`` is
the layer norm. BatchTopK saves no threshold. Whether a JumpReLU subtracts ``b_dec`` is an argument of the call there.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.formats.common import TENSORS, Config, Contents, Given, build, check_width, like, standard
from fastfg.sae.model import SparseAutoencoder

NAME = "BatchTopK"
FILES = "BatchTopK: sae.pt + config.json"
LOG_THRESHOLD = "jumprelu.log_threshold"
UNUSED = ("num_batches_not_active",)
TYPES = ("vanilla", "topk", "batchtopk", "jumprelu")
POINT = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def matches(contents: Contents) -> bool:
    return contents.kind == "torch" and "W_enc" in contents.keys and contents.config("sae_type") is not None


def block(contents: Contents) -> int | None:
    config = contents.config("sae_type")
    assert config is not None
    layer = config.get("layer")
    return layer if type(layer) is int and layer >= 0 else None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config = contents.config("sae_type")
    assert config is not None
    kind = config.get("sae_type")
    if kind not in TYPES:
        raise ValueError(f"sae_type: expected one of {TYPES} in {config.file}, got {kind!r}")
    if config.get("activation", "relu") != "relu":
        raise ValueError(f"activation: expected relu in {config.file}, got {config.get('activation')!r}")
    jump = (LOG_THRESHOLD,) if kind == "jumprelu" else ()
    picked = contents.pick(contents.mapping(), (*TENSORS, *jump), unused=UNUSED)
    weights, folded = standard(picked), ["log_threshold"] if jump else []
    if config.get("tied_weights") is True:
        weights["W_dec"] = weights["W_enc"].T.contiguous()
        folded.append("tied decoder")
    if kind in ("topk", "batchtopk") and config.get("use_encoder_bias") is not True:
        weights["b_enc"] = torch.zeros_like(weights["b_enc"])
    normed = given.agree("normalize", _normalized(config))
    sae = build(
        contents, given, NAME,
        site=_site(config),
        layer=block(contents),
        model=config.get("model_name"),
        folded=folded,
        normalize=normed,
        **_activation(config, kind, given, picked),
        **weights,
    )  # fmt: skip
    check_width(config, sae, contents.file, d="act_size", F="dict_size")
    return sae


def _normalized(config: Config) -> str | None:
    flag = config.optional("input_unit_norm", bool)
    return None if flag is None else "layer_norm" if flag else "none"


def _site(config: Config) -> str | None:
    site, point = config.get("site"), config.get("hook_point")
    if isinstance(point, str) and not POINT.fullmatch(point):
        return point
    return str(site) if site is not None else "resid_post" if isinstance(point, str) else None


def _activation(config: Config, kind: str, given: Given, picked: dict[str, Tensor]) -> dict[str, Any]:
    W_enc = picked["W_enc"]
    if kind == "vanilla":
        return {"activation": "relu", "subtract_b_dec": True}
    if kind == "topk":
        return {"activation": "topk", "k": config.field("top_k", int), "subtract_b_dec": True}
    if kind == "batchtopk":
        threshold = given.need("threshold", "its k counts a whole batch, and no threshold is saved")
        return {"activation": "batch_topk", "threshold": like(threshold, W_enc), "subtract_b_dec": True}
    subtract = given.need("subtract_b_dec", "it is an argument of the call there (its default is False)")
    return {"activation": "jumprelu", "threshold": picked[LOG_THRESHOLD].exp(), "subtract_b_dec": subtract}
