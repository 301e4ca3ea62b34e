"""ViT-Prisma: a folder with ``config.json`` and a state dict, or one file with a pickled config and a state dict.

Prisma's standard and gated SAEs always subtract ``b_dec``. Its ``layer_norm`` divides by (unbiased std + 1e-5). The
defaults of normalisation and activation changed between versions of Prisma, so both must be in the config or be given.
A config inside the weights file beats the one beside it.
"""

from __future__ import annotations

from typing import Any

from fastfg.sae.formats.common import (
    POINT,
    TENSORS,
    Config,
    Contents,
    Given,
    build,
    check_width,
    said_tokens,
    standard,
    text,
)
from fastfg.sae.model import SparseAutoencoder

NAME = "Prisma"
FILES = "Prisma: config.json + weights.pt, or one .pt, .pkl or .pkl.gz file with its config"
FIELDS = ("hook_point_layer", "layer_subtype", "activation_fn_str", "expansion_factor", "vit_model_name", "d_in")
ACTIVATIONS = {"relu": "relu", "topk": "topk", "tanh-relu": "tanh_relu"}
NORMALIZATIONS = {
    None: "none",
    "none": "none",
    "None": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
GATED = ("r_mag", "b_gate", "b_mag")


def matches(contents: Contents) -> bool:
    if contents.kind != "torch":
        return False
    config = _config(contents)
    if config is None or config.has("format", "block_layer", "sae_type", "trainer"):
        return False
    return config.has(*FIELDS)


def block(contents: Contents) -> int | None:
    config = _config(contents)
    assert config is not None
    for name in ("layer", "hook_point_layer"):
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"path: expected {name} in {config.file} to be a block from 0 on, got {value!r}")
            return value
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config, file = _config(contents), contents.file
    assert config is not None
    _check_site(config, contents)
    state = contents.mapping("state_dict") if "state_dict" in contents.keys else contents.mapping()
    if "b_dec_out" in state:
        raise ValueError(f"path: expected a sparse autoencoder in {file}, got a transcoder (it has b_dec_out)")
    unknown = sorted(str(name)[:60] for name in state if name not in (*TENSORS, *GATED))
    if unknown:
        raise ValueError(f"path: expected tensors among {(*TENSORS, *GATED)} in {file}, got {unknown[:12]}")
    activation = _activation(config, state, given)
    gated = activation["activation"] == "gated"
    picked = contents.pick(state, (*TENSORS, *(GATED if gated else ())), unused=GATED)
    sae = build(
        contents, given, NAME,
        site="resid_post",
        layer=block(contents),
        model=text(config.get("vit_model_name") or config.get("model_name")),
        tokens=said_tokens(config.get("cls_token_only"), config.get("use_patches_only"), config.file),
        normalize=_one_of(config, "normalize_activations", NORMALIZATIONS, given, "normalize"),
        subtract_b_dec=True,
        **standard(picked),
        **{name: picked[name] for name in GATED if gated},
        **activation,
    )  # fmt: skip
    check_width(config, sae, file)
    return sae


def _config(contents: Contents) -> Config | None:
    """The config inside the file, or else the one beside it."""
    return contents.inside("cfg") or contents.configs.get("config.json")


def _check_site(config: Config, contents: Contents) -> None:
    """Check that the SAE was trained on the patch tokens of a block's output."""
    wanted = (("layer_subtype", "hook_resid_post"), ("cls_token_only", False), ("is_transcoder", False))
    for name, fits in wanted:
        if config.get(name, fits) != fits:
            raise ValueError(f"path: expected {name} to be {fits!r} in {config.file}, got {config.get(name)!r}")
    point = config.get("hook_point")
    number = block(contents)
    match = POINT.fullmatch(point) if isinstance(point, str) else None
    if point is not None and (match is None or number not in (None, int(match[1]))):
        where = "blocks.*" if number is None else f"blocks.{number}"
        raise ValueError(f"path: expected hook_point to be {where}.hook_resid_post in {config.file}, got {point!r}")


def _activation(config: Config, state: dict[str, Any], given: Given) -> dict[str, Any]:
    name = _one_of(config, "activation_fn_str", ACTIVATIONS, given, "activation")
    has_gate = any(key in state for key in GATED)
    architecture = config.get("architecture", "standard")
    if architecture == "gated" and name == "relu":
        return {"activation": "gated"}
    if architecture not in ("standard", "vanilla") or has_gate:
        weights = " and weights of a gated SAE" if has_gate else ""
        raise ValueError(
            f"architecture: expected standard, or gated with relu, got {architecture!r} with {name!r}{weights} "
            f"in {config.file}"
        )
    if name != "topk":
        return {"activation": name}
    options = Config(config.field("activation_fn_kwargs", dict), config.file)
    return {"activation": name, "k": options.field("k", int)}


def _one_of(config: Config, key: str, known: dict[Any, str], given: Given, override: str) -> str:
    if key not in config:
        value = given.may(override)
        if value in known.values():
            return str(value)
        raise ValueError(
            f"{key}: expected one of {sorted(map(str, known))} in {config.file}, which does not have the field; "
            f"no default is right for every version of Prisma ({override}= gives it)"
        )
    value = config.get(key)
    if not isinstance(value, (str, type(None))) or value not in known:
        raise ValueError(f"{key}: expected one of {sorted(map(str, known))} in {config.file}, got {value!r}")
    return known[value]
