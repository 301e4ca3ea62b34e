"""CLIP-Scope: one file with ``k``, the sizes and a state dict. TopK without a bias and without ReLU."""

from __future__ import annotations

import torch

from fastfg.sae.formats.common import Config, Contents, Given, build, check_width
from fastfg.sae.model import SparseAutoencoder

NAME = "CLIP-Scope"
FILES = "CLIP-Scope: one .pt file with k and model_state_dict"
KEYS = {"k", "n_features", "d_in", "model_state_dict"}


def matches(contents: Contents) -> bool:
    return contents.kind == "torch" and contents.keys >= KEYS


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    unknown = sorted(contents.keys - KEYS)
    if unknown:
        raise ValueError(f"path: expected {sorted(KEYS)} in {contents.file}, got {unknown[:12]}")
    sizes = Config(contents.mapping(), contents.file)
    picked = contents.pick(contents.mapping("model_state_dict"), ("pre_b", "enc", "dec"))
    enc = picked["enc"]
    if enc.ndim != 2:
        raise ValueError(f"path: expected enc in {contents.file} to be a matrix, got {list(enc.shape)}")
    sae = build(
        contents, given, NAME,
        site=None,
        W_enc=enc,
        b_enc=torch.zeros(enc.shape[1], dtype=enc.dtype),
        W_dec=picked["dec"],
        b_dec=picked["pre_b"],
        activation="topk",
        k=sizes.field("k", int),
        post="none",
        subtract_b_dec=True,
    )  # fmt: skip
    check_width(sizes, sae, contents.file, F="n_features")
    return sae
