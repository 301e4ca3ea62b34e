"""ViT-Prisma's format: ``config.json`` (a VisionModelSAERunnerConfig) beside ``weights.pt`` (a state dict).

Its standard and gated SAEs always subtract ``b_dec``; ``layer_norm`` there divides by (std + 1e-5), unbiased.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastfg.sae.model import SparseAutoencoder

FILES = "Prisma: config.json + weights.pt"
ACTIVATIONS = {"relu": "relu", "topk": "topk", "tanh-relu": "tanh_relu"}
NORMALIZATIONS = {
    None: "none",
    "none": "none",
    "None": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


def reads(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "weights.pt").is_file()


def read(folder: Path) -> SparseAutoencoder:
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    if "state_dict" in state:
        state = state["state_dict"]
    return SparseAutoencoder(
        **{name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
        normalize=_one_of(config, "normalize_activations", NORMALIZATIONS, "layer_norm"),
        subtract_b_dec=True,
        **_activation(config, state),
    )


def _activation(config: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    name = _one_of(config, "activation_fn_str", ACTIVATIONS, "relu")
    architecture = config.get("architecture", "standard")
    if architecture == "gated" and name == "relu":
        return {"activation": "gated"} | {key: state[key] for key in ("r_mag", "b_gate", "b_mag")}
    if architecture == "standard":
        k = (config.get("activation_fn_kwargs") or {}).get("k") if name == "topk" else None
        return {"activation": name, "k": k}
    raise ValueError(f"architecture: expected standard, or gated with relu, got {architecture!r} with {name!r}")


def _one_of(config: dict[str, Any], key: str, known: dict[Any, str], default: str) -> str:
    value = config.get(key, default)
    if value not in known:
        raise ValueError(f"{key}: expected one of {sorted(map(str, known))} in config.json, got {value!r}")
    return known[value]
