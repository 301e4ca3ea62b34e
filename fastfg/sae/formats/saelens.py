"""SAELens 3.x to 6.x: ``cfg.json`` and ``sae_weights.safetensors``, of inference and of training.

Training files keep what an export folds: ``log_threshold``, the scalar ``topk_threshold`` of BatchTopK, and
pre-activations that are multiplied by the norm of their decoder row, which is folded here. Files of 3.x may have a
factor per feature that multiplies the codes before they are decoded. It is folded into the decoder.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.formats import folding
from fastfg.sae.formats.common import POINT, Config, Contents, Given, build, check_width, like, scalar, standard, text
from fastfg.sae.model import SparseAutoencoder

NAME = "SAELens"
FILES = "SAELens: cfg.json + sae_weights.safetensors"
FIELDS = ("hook_name", "hook_point", "sae_lens_version", "metadata", "apply_b_dec_to_input", "architecture")
BATCH = ("batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
REFUSED = {
    "matching_pursuit": "codes found step by step, not by one encoder product",
    "temporal": "codes that depend on the other tokens",
    **dict.fromkeys(TRANSCODERS, "a transcoder, whose output is another site than its input"),
}
NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
SCALED = "expected_average_only_in"
UNUSED = ("scaling_factor", "finetuning_scaling_factor", "topk_threshold")
SCALER = "activation_scaler.json"


def matches(contents: Contents) -> bool:
    config = _config(contents)
    if contents.kind != "safetensors" or config is None or config.get("format") == "fastfg":
        return False
    return "W_dec" in contents.keys and "encoder.weight" not in contents.keys


def block(contents: Contents) -> int | None:
    config = _config(contents)
    assert config is not None
    point = POINT.fullmatch(_point(config) or "")
    if point is not None:
        return int(point[1])
    layer = config.get("hook_layer", config.get("hook_point_layer"))
    return layer if type(layer) is int and layer >= 0 else None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config = _config(contents)
    assert config is not None
    architecture = config.get("architecture", "standard")
    if architecture in REFUSED:
        raise ValueError(f"path: expected a sparse autoencoder in {contents.file}, got {REFUSED[architecture]}")
    point, metadata = _point(config), config.inner("metadata")
    state = contents.mapping()
    weights, arguments, folded = _weights(contents, state, config, given, architecture)
    sae = build(
        contents, given, NAME,
        site=_site(point),
        layer=block(contents),
        model=text(config.get("model_name") or metadata.get("model_name")),
        folded=folded,
        subtract_b_dec=given.agree("subtract_b_dec", config.optional("apply_b_dec_to_input", bool)),
        **_normalization(contents, config, given, weights["W_enc"]),
        **weights,
        **arguments,
    )  # fmt: skip
    check_width(config, sae, contents.file)
    return sae


def _config(contents: Contents) -> Config | None:
    return contents.config(*FIELDS)


def _point(config: Config) -> str | None:
    for name in ("hook_name", "hook_point"):
        for place in (config.inner("metadata"), config):
            if isinstance(place.get(name), str):
                return str(place.get(name))
    return None


def _site(point: str | None) -> str | None:
    if point is None:
        return None
    return "resid_post" if POINT.fullmatch(point) else point


def _weights(
    contents: Contents, state: dict[str, Any], config: Config, given: Given, architecture: str
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The four weights, the arguments of the activation, and what was folded."""
    kind = _activation(config, architecture, contents)
    names = ["W_enc", "W_dec", "b_dec"]
    names += ["b_gate", "b_mag", "r_mag"] if kind == "gated" else ["b_enc"]
    finetuned = config.get("finetuning_scaling_factor") is True
    optional = ["threshold", "log_threshold"] if kind == "jumprelu" else []
    optional += ["topk_threshold"] if kind == "batch_topk" else []
    factors = [name for name in ("finetuning_scaling_factor", "scaling_factor") if name in state and finetuned]
    picked = contents.pick(state, names, (*optional, *factors), UNUSED)
    if kind == "gated":
        picked["b_enc"] = torch.zeros_like(picked["b_gate"])
    weights, folded = standard(picked), []
    arguments = _parameters(contents, config, given, kind, picked)
    if "log_threshold" in picked:
        folded.append("log_threshold")
    rescaled = config.optional("rescale_acts_by_decoder_norm", bool)
    if kind in ("topk", "batch_topk") and architecture != "standard":
        rescaled = given.agree("decoder_norm", rescaled)
    if rescaled:
        weights = folding.decoder_norm(weights)
        folded.append("decoder_norm")
    if finetuned:
        if not factors:
            raise ValueError(f"path: expected finetuning_scaling_factor in {contents.file}, as its config says")
        weights["W_dec"] = folding.row_factor(weights["W_dec"], picked[factors[0]])
        folded.append(factors[0])
    return weights, arguments, folded


def _activation(config: Config, architecture: str, contents: Contents) -> str:
    """fastfg's name of the activation. Before version 6, ``activation_fn`` says what ``architecture`` says now."""
    old = config.get("activation_fn", config.get("activation_fn_str"))
    if architecture in BATCH:
        return "batch_topk"
    if architecture in ("topk", "abstopk", "jumprelu") and old in (None, "relu", architecture):
        return "jumprelu" if architecture == "jumprelu" else "topk"
    if architecture == "gated" and old in (None, "relu"):
        return "gated"
    if architecture == "standard" and old in (None, "relu", "topk", "tanh-relu"):
        return {"topk": "topk", "tanh-relu": "tanh_relu"}.get(old or "relu", "relu")
    raise ValueError(f"architecture: expected a known one in {contents.file}, got {architecture!r} with {old!r}")


def _parameters(
    contents: Contents, config: Config, given: Given, kind: str, picked: dict[str, Tensor]
) -> dict[str, Any]:
    W_enc = picked["W_enc"]
    if kind == "topk":
        options = config.inner("activation_fn_kwargs")
        k = config.optional("k", int) or options.optional("k", int)
        signed = {"post": "none", "ranking": "magnitude"} if config.get("architecture") == "abstopk" else {}
        return {"activation": "topk", "k": given.agree("k", k), **signed}
    if kind == "jumprelu":
        if "threshold" not in picked and "log_threshold" not in picked:
            raise ValueError(f"path: expected threshold or log_threshold in {contents.file}, got {sorted(picked)}")
        threshold = picked["threshold"] if "threshold" in picked else picked["log_threshold"].exp()
        return {"activation": "jumprelu", "threshold": like(threshold, W_enc)}
    if kind == "batch_topk":
        said = picked.get("topk_threshold")
        threshold = scalar(said, W_enc) if said is not None else like(given.need("threshold"), W_enc)
        return {"activation": "batch_topk", "threshold": threshold}
    if kind == "gated":
        return {"activation": "gated"} | {name: picked[name] for name in ("b_gate", "b_mag", "r_mag")}
    return {"activation": kind}


def _normalization(contents: Contents, config: Config, given: Given, weights: Tensor) -> dict[str, Any]:
    said = config.get("normalize_activations")
    if isinstance(said, bool):  # before version 6
        said = SCALED if said else "none"
    if said is None:
        return {"normalize": given.need("normalize")}
    if said == SCALED:
        scale = _stored_scale(contents)
        scale = given.need("input_scale", f"{SCALED} needs it (1: it is folded)") if scale is None else 1 / scale
        return {"normalize": "none", "input_scale": None if scale == 1 else like(scale, weights)}
    if said not in NORMALIZATIONS:
        why = " (an export folds it)" if said == "covariance_whitening" else ""
        raise ValueError(
            f"normalize_activations: expected one of {sorted(NORMALIZATIONS)} or {SCALED} in {config.file}, "
            f"got {said!r}{why}"
        )
    return {"normalize": NORMALIZATIONS[said]}


def _stored_scale(contents: Contents) -> float | None:
    """The factor of ``activation_scaler.json``, which a training run writes beside its weights."""
    file = contents.file.parent / SCALER
    if not file.is_file() or file.stat().st_size > 1 << 20:
        return None
    try:
        value = json.loads(file.read_bytes()).get("scaling_factor")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"path: expected scaling_factor in {file}, got {type(error).__name__}") from error
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"path: expected scaling_factor in {file} to be a number > 0, got {value!r}")
    return float(value)
