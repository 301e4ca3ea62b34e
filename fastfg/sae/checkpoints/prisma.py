"""ViT-Prisma's format: ``config.json`` (a VisionModelSAERunnerConfig) and ``weights.pt`` (a state dict).

Prisma's standard and gated SAEs always subtract ``b_dec``. Its ``layer_norm`` divides by (unbiased std + 1e-5). The
defaults of normalisation and activation changed between versions of Prisma, so both must be in the config.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fastfg.sae.checkpoints.files import CONFIG, field, pick, read_config, read_tensors
from fastfg.sae.checkpoints.names import block_in_config
from fastfg.sae.model import SparseAutoencoder

WEIGHTS = "weights.pt"
FILES = f"Prisma: {CONFIG} + {WEIGHTS}"
ACTIVATIONS = {"relu": "relu", "topk": "topk", "tanh-relu": "tanh_relu"}
NORMALIZATIONS = {
    None: "none",
    "none": "none",
    "None": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
POINT = re.compile(r"blocks\.(\d+)\.hook_resid_post")
GATED = ("r_mag", "b_gate", "b_mag")


def reads(folder: Path) -> bool:
    """Whether the folder has both files of this format, with a config that is not fastfg's own."""
    both = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    return both and "format" not in read_config(folder)


def read(folder: Path) -> SparseAutoencoder:
    """The SAE in ``folder``. Raises ValueError that names the file and what is wrong with it."""
    config, file = read_config(folder), folder / WEIGHTS
    _check_site(config, folder)
    state = read_tensors(file, lambda f: torch.load(f, map_location="cpu", weights_only=True))
    state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise ValueError(f"path: expected state_dict in {file} to be a dict, got {type(state).__name__}")
    if "b_dec_out" in state:
        raise ValueError(f"path: expected a sparse autoencoder in {file}, got a transcoder (it has b_dec_out)")
    unknown = sorted(set(map(str, state)) - {*TENSORS, *GATED})
    if unknown:
        raise ValueError(f"path: expected tensors among {(*TENSORS, *GATED)} in {file}, got {unknown}")
    activation = _activation(config, state, folder)
    gated = GATED if activation["activation"] == "gated" else ()
    sae = SparseAutoencoder(
        **pick(state, (*TENSORS, *gated), file),
        normalize=_one_of(config, "normalize_activations", NORMALIZATIONS, folder),
        subtract_b_dec=True,
        **activation,
    )
    if "d_in" in config and field(config, "d_in", int, folder) != sae.d:
        raise ValueError(f"path: expected d_in={config['d_in']} in {file}, as {CONFIG} says, got {sae.d}")
    return sae


def _check_site(config: dict[str, Any], folder: Path) -> None:
    """Check that the SAE was trained on the patch tokens of a block's output."""
    wanted = (("layer_subtype", "hook_resid_post"), ("cls_token_only", False), ("is_transcoder", False))
    for name, fits in wanted:
        if config.get(name, fits) != fits:
            raise ValueError(f"path: expected {name} to be {fits!r} in {folder / CONFIG}, got {config[name]!r}")
    point = config.get("hook_point")
    block = block_in_config(config, folder)
    match = POINT.fullmatch(point) if isinstance(point, str) else None
    if point is not None and (match is None or block not in (None, int(match[1]))):
        where = "blocks.*" if block is None else f"blocks.{block}"
        raise ValueError(f"path: expected hook_point to be {where}.hook_resid_post in {folder / CONFIG}, got {point!r}")


def _activation(config: dict[str, Any], state: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = _one_of(config, "activation_fn_str", ACTIVATIONS, folder)
    has_gate = any(key in state for key in GATED)
    architecture = config.get("architecture", "standard")
    if architecture == "gated" and name == "relu":
        return {"activation": "gated"}
    if architecture != "standard" or has_gate:
        weights = " and weights of a gated SAE" if has_gate else ""
        raise ValueError(
            f"architecture: expected standard, or gated with relu, got {architecture!r} with {name!r}{weights} "
            f"in {folder / CONFIG}"
        )
    if name != "topk":
        return {"activation": name}
    options = field(config, "activation_fn_kwargs", dict, folder)
    return {"activation": name, "k": field(options, "k", int, folder)}


def _one_of(config: dict[str, Any], key: str, known: dict[Any, str], folder: Path) -> str:
    if key not in config:
        raise ValueError(
            f"{key}: expected one of {sorted(map(str, known))} in {folder / CONFIG}, which does not have the field; "
            "no default is right for every version of Prisma"
        )
    value = config[key]
    if not isinstance(value, (str, type(None))) or value not in known:
        raise ValueError(f"{key}: expected one of {sorted(map(str, known))} in {folder / CONFIG}, got {value!r}")
    return known[value]
