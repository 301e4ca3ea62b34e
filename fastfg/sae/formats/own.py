"""fastfg's own format: ``config.json`` and ``sae.safetensors``. A saved SAE is read back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastfg.files import whole, write_tensors
from fastfg.sae.formats.common import TENSORS, Config, Contents, Given, block_at
from fastfg.sae.model import OPTIONAL_TENSORS, SparseAutoencoder, check_finite

NAME = "fastfg"
CONFIG, WEIGHTS = "config.json", "sae.safetensors"
FILES = f"fastfg: {CONFIG} + {WEIGHTS}"


def matches(contents: Contents) -> bool:
    return contents.kind == "safetensors" and _config(contents) is not None


def block(contents: Contents) -> int | None:
    config = _config(contents)
    return None if config is None else block_at(config, "layer")


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config = _config(contents)
    assert config is not None
    arguments: dict[str, Any] = {name: config.field(name, str) for name in ("activation", "normalize")}
    arguments["subtract_b_dec"] = config.field("subtract_b_dec", bool)
    if config.get("k") is not None:
        arguments["k"] = config.field("k", int)
    for name, kind in (("post", str), ("ranking", str), ("strict", bool), ("provenance", dict)):
        if name in config:  # files from before these fields have none
            arguments[name] = config.field(name, kind)
    model, said = arguments.get("provenance", {}).get("model"), given.may("model")
    if None not in (model, said) and model != said:
        raise ValueError(f"model: expected an SAE of {said!r}, got one of {model!r} in {contents.file}")
    given.site(str(arguments.get("provenance", {}).get("site", "resid_post")))
    given.finish()
    state = contents.pick(contents.mapping(), TENSORS, OPTIONAL_TENSORS)
    sae = SparseAutoencoder(**arguments, **state)
    for name, size in (("d", sae.d), ("n_features", sae.n_features)):
        if config.field(name, int) != size:
            raise ValueError(
                f"path: expected {name}={config.get(name)} in {contents.file}, as {CONFIG} says, got {size}"
            )
    return sae


def write(sae: SparseAutoencoder, folder: Path) -> None:
    """Write ``sae`` into ``folder``, which is created if it does not exist. ValueError for NaN weights."""
    check_finite(sae.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses tensors that share memory (W_enc may be W_dec.T)
    tensors = {name: t.contiguous().clone() for name, t in sae.state_dict().items()}
    layer = sae.provenance.get("layer")
    config = {"format": NAME} | ({} if layer is None else {"layer": layer}) | sae.config()
    with whole(folder / CONFIG) as unfinished:  # which is there once the weights are
        unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder / WEIGHTS, tensors)


def _config(contents: Contents) -> Config | None:
    config = contents.configs.get(CONFIG)
    return config if config is not None and config.get("format") == NAME else None
