"""sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors``.

``f = topk(relu((x - b_dec) @ W^T + b))``; ``groupmax`` takes the largest of each of k runs of neighbouring features.
Files of June to August 2024 may be ``signed``: top-k by magnitude, without ReLU. The site is the module that the folder
names (``layers.9``), so it must be given.
"""

from __future__ import annotations

from typing import Any

from fastfg.sae.formats.common import Config, Contents, Given, build, check_width, transposed
from fastfg.sae.model import SparseAutoencoder

NAME = "sparsify"
FILES = "sparsify: cfg.json + sae.safetensors"
TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def matches(contents: Contents) -> bool:
    return contents.kind == "safetensors" and {"encoder.weight", "W_dec"} <= contents.keys


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config = contents.config("k", "d_in", "expansion_factor")
    if config is None:
        raise ValueError(f"path: expected cfg.json beside {contents.file}, with its k and activation")
    if "W_skip" in contents.keys or config.get("transcode") is True or config.get("skip_connection") is True:
        raise ValueError(f"path: expected a sparse autoencoder in {contents.file}, got a transcoder")
    picked = contents.pick(contents.mapping(), TENSORS)
    sae = build(
        contents, given, NAME,
        site=None,
        W_enc=transposed(picked, "encoder.weight", contents),
        b_enc=picked["encoder.bias"],
        W_dec=picked["W_dec"],
        b_dec=picked["b_dec"],
        subtract_b_dec=True,
        k=config.field("k", int),
        **_activation(config),
    )  # fmt: skip
    latents = config.optional("num_latents", int)  # 0: the product of width and expansion
    check_width(config, sae, contents.file, F="num_latents" if latents else "")
    return sae


def _activation(config: Config) -> dict[str, Any]:
    name = config.get("activation", "topk")
    if config.get("signed") is True and name == "topk":
        return {"activation": "topk", "post": "none", "ranking": "magnitude"}
    if name not in ("topk", "groupmax"):
        raise ValueError(f"activation: expected topk or groupmax in {config.file}, got {name!r}")
    return {"activation": name}
