"""patchsae and ConceptScope: one file with a config (a dict, or a pickled one) and a state dict.

``f = relu((x - b_dec) @ W_enc + b_enc)``, without normalisation, at the output of a block of CLIP's image encoder. A
block that counts from the end must be given.
"""

from __future__ import annotations

from fastfg.sae.formats.common import (
    TENSORS,
    Config,
    Contents,
    Given,
    block_at,
    build,
    check_width,
    said_tokens,
    standard,
)
from fastfg.sae.model import SparseAutoencoder

NAME = "patchsae"
FILES = "patchsae and ConceptScope: one .pt file with its config"


def matches(contents: Contents) -> bool:
    config = _config(contents)
    return config is not None and "state_dict" in contents.keys and "block_layer" in config


def block(contents: Contents) -> int | None:
    config = _config(contents)
    assert config is not None
    return block_at(config, "block_layer")


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config = _config(contents)
    assert config is not None
    gated = [name for name in ("gated_sae", "is_gated", "use_gated") if config.get(name) is True]
    if gated or config.get("architecture", "standard") not in ("standard", "vanilla"):
        raise ValueError(
            f"architecture: expected standard in {contents.file}, got a gated SAE, which has no encoder there"
        )
    module = config.get("module_name", "resid")
    sae = build(
        contents, given, NAME,
        site="resid_post" if module == "resid" else str(module),
        layer=block(contents),
        model=config.get("model_name"),
        tokens=said_tokens(config.get("class_token"), None, contents.file),
        activation="relu",
        subtract_b_dec=True,
        **standard(contents.pick(contents.mapping("state_dict"), TENSORS)),
    )  # fmt: skip
    check_width(config, sae, contents.file)
    return sae


def _config(contents: Contents) -> Config | None:
    return contents.inside("cfg", "config") if contents.kind == "torch" else None
