"""saev: one file, a line of JSON and a torch stream after it.

Without ``schema``, the header is a flat config (legacy): the input had ``b_dec`` subtracted, after it was shifted and
scaled by the data set's mean vector and a scalar, which no file has. Schema 1 was written before and after the
subtraction was dropped, so it must be given. Schemas 2 to 5 do not subtract. TopK keeps negative codes.
"""

from __future__ import annotations

from typing import Any

from fastfg.sae.formats.common import (
    TENSORS,
    Config,
    Contents,
    Given,
    build,
    check_width,
    input_affine,
    like,
    scalar,
    standard,
)
from fastfg.sae.model import SparseAutoencoder

NAME = "saev"
FILES = "saev: sae.pt, a JSON line and a torch stream"
THRESHOLD = "activation.threshold"
SCHEMAS = (1, 2, 3, 4, 5)
ACTIVATIONS = ("Relu", "TopK", "BatchTopK")
WHY = "saev's older files were trained on (x - mean) / scale and have neither (0 and 1: the raw residuals)"


def matches(contents: Contents) -> bool:
    return contents.kind == "saev"


def block(contents: Contents) -> int | None:
    return None


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    header = Config(contents.weights.header or {}, contents.file)
    schema = header.get("schema")
    legacy = schema is None
    if not legacy and (schema not in SCHEMAS or isinstance(schema, bool)):
        raise ValueError(f"schema: expected one of {SCHEMAS} or none in {contents.file}, got {schema!r}")
    config = header if legacy else Config(header.field("cfg", dict), contents.file)
    picked = contents.pick(contents.mapping(), TENSORS, (THRESHOLD,))
    weights = standard(picked)
    if legacy:
        subtract: bool = True
        rest: dict[str, Any] = {"activation": "relu"} | input_affine(given, weights["W_enc"], WHY)
    else:
        why = "schema 1 was written with and without it (with it until 31 July 2025)"
        subtract = given.need("subtract_b_dec", why) if schema == 1 else False
        rest = _activation(header, config, given, picked)
    sae = build(contents, given, NAME, site=None, subtract_b_dec=subtract, **weights, **rest)
    for width in ("d_vit", "d_model"):
        check_width(config, sae, contents.file, d=width)
    return sae


def _activation(header: Config, config: Config, given: Given, picked: dict[str, Any]) -> dict[str, Any]:
    name, options = _named(header, config)
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS} in {header.file}, got {name!r}")
    if name == "Relu":
        return {"activation": "relu"}
    if name == "TopK":
        return {"activation": "topk", "k": options.field("top_k", int), "post": "none"}
    threshold = picked.get(THRESHOLD)
    if threshold is None:
        why = "early BatchTopK SAEs counted k over a batch and saved no threshold"
        return {"activation": "batch_topk", "threshold": like(given.need("threshold", why), picked["W_enc"])}
    return {"activation": "batch_topk", "threshold": scalar(threshold, picked["W_enc"])}


def _named(header: Config, config: Config) -> tuple[Any, Config]:
    """The activation's name and options, in one of the two layouts of schema 1 or in the later one."""
    cls = header.get("cls")
    if header.get("schema") == 1 and cls not in (None, "SparseAutoencoderConfig"):
        return cls, config
    activation = Config(config.field("activation", dict), header.file)
    return activation.get("cls"), activation.inner("params")
