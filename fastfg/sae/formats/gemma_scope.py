"""Gemma Scope: ``params.npz``, and ``params.safetensors`` with ``config.json``. JumpReLU, without subtraction."""

from __future__ import annotations

from fastfg.sae.formats.common import Contents, Given, build
from fastfg.sae.model import SparseAutoencoder

NAME = "Gemma Scope"
FILES = "Gemma Scope: params.npz, or params.safetensors + config.json"
NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
SKIPS = ("affine_skip_connection", "w_skip", "W_skip")


def matches(contents: Contents) -> bool:
    if contents.kind == "npz":
        return bool({"w_enc", "W_enc"} & contents.keys)
    return contents.kind == "safetensors" and "w_enc" in contents.keys


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    state = {NAMES.get(name.lower(), name): value for name, value in contents.mapping().items()}
    if any(name in state for name in SKIPS):
        raise ValueError(f"path: expected a sparse autoencoder in {contents.file}, got a transcoder with a skip")
    config = contents.config("architecture")
    kind = "jump_relu" if config is None or contents.kind == "npz" else config.get("architecture")
    if kind != "jump_relu":
        raise ValueError(f"architecture: expected jump_relu in {contents.file}, got {kind!r}")
    picked = contents.pick(state, NAMES.values())
    return build(contents, given, NAME, site=None, activation="jumprelu", subtract_b_dec=False, **picked)
