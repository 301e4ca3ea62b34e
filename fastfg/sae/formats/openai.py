"""OpenAI's sparse_autoencoder: one state dict with the activation's name among its tensors.

``f = act((N(x) - pre_bias) @ W^T + latent_bias)``. ``N`` is the layer norm if the activation is TopK, else nothing. A
tied decoder is the encoder's transpose.
"""

from __future__ import annotations

from typing import Any

from fastfg.sae.formats.common import Config, Contents, Given, build, transposed
from fastfg.sae.model import SparseAutoencoder

NAME = "OpenAI"
FILES = "OpenAI: one .pt state dict"
TENSORS = ("pre_bias", "encoder.weight", "latent_bias")
DECODERS = ("decoder.weight", "decoder.linear.weight")  # the second is the tied encoder's
UNUSED = (
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation",
    "activation_state_dict",
)  # fmt: skip


def matches(contents: Contents) -> bool:
    return contents.kind == "torch" and {"pre_bias", "latent_bias", "encoder.weight"} <= contents.keys


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    state = contents.mapping()
    picked = contents.pick(state, TENSORS, DECODERS, UNUSED)
    if "decoder.weight" in picked:
        W_dec = transposed(picked, "decoder.weight", contents)
    else:  # decoder.linear.weight is the encoder's own weight, used in the other direction
        W_dec = contents.tensor(state, "encoder.weight")
    return build(
        contents, given, NAME,
        site=None,
        W_enc=transposed(picked, "encoder.weight", contents),
        b_enc=picked["latent_bias"],
        W_dec=W_dec,
        b_dec=picked["pre_bias"],
        subtract_b_dec=True,
        folded=() if "decoder.weight" in picked else ("tied decoder",),
        **_activation(Config(state, contents.file), contents, given),
    )  # fmt: skip


def _activation(state: Config, contents: Contents, given: Given) -> dict[str, Any]:
    name = state.get("activation", "ReLU")
    if name == "ReLU":
        return {"activation": "relu"}
    if name != "TopK":
        raise ValueError(f"activation: expected ReLU or TopK in {contents.file}, got {name!r}")
    options = state.inner("activation_state_dict")
    k = contents.integer(options.values, "k")
    post = options.get("postact_fn")
    known = {"ReLU": "relu", "Identity": "none", None: None}
    if post not in known:
        raise ValueError(f"postact_fn: expected ReLU or Identity in {contents.file}, got {post!r}")
    return {
        "activation": "topk",
        "k": given.agree("k", k),
        "post": given.agree("post", known[post]),
        "normalize": "layer_norm",
    }
