"""fastfg's own format: ``config.json`` and ``sae.safetensors``. A saved SAE is read back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastfg.files import whole, write_tensors
from fastfg.sae.files.stored import short
from fastfg.sae.formats.common import SITE, TENSORS, Config, Contents, Given
from fastfg.sae.model import OPTIONAL_TENSORS, SparseAutoencoder, check_finite

NAME = "fastfg"
CONFIG, WEIGHTS = "config.json", "sae.safetensors"
FILES = f"fastfg: {CONFIG} + {WEIGHTS}"
TEXT, TEXTS, OBJECT, BLOCK = "a string", "a list of strings", "an object", "a 0-based block"
PROVENANCE = {
    **dict.fromkeys(("format", "file", "site", "model", "tokens", "weights"), TEXT),
    **dict.fromkeys(("folded", "given"), TEXTS),
    **dict.fromkeys(("recipe", "data", "validation"), OBJECT),
    "layer": BLOCK,
}  # what fastfg writes; others are the user's


def matches(contents: Contents) -> bool:
    return contents.kind == "safetensors" and _config(contents) is not None


def block(contents: Contents) -> int | None:
    config = _config(contents)
    if config is None:
        return None
    _check_origin(config)
    layer: int | None = config.get("layer")
    return layer


def read(contents: Contents, given: Given) -> SparseAutoencoder:
    config = _config(contents)
    assert config is not None
    _check_origin(config)
    arguments: dict[str, Any] = {name: config.field(name, str) for name in ("activation", "normalize")}
    arguments["subtract_b_dec"] = config.field("subtract_b_dec", bool)
    if config.get("k") is not None:
        arguments["k"] = config.field("k", int)
    for name, kind in (("post", str), ("ranking", str), ("strict", bool), ("provenance", dict)):
        if name in config:  # files from before these fields have none
            arguments[name] = config.field(name, kind)
    provenance = arguments.get("provenance", {})
    model, said = provenance.get("model"), given.may("model")
    if None not in (model, said) and model != said:
        raise ValueError(f"model: expected an SAE of {said!r}, got one of {model!r} in {contents.file}")
    given.site(SITE if provenance.get("site") is None else provenance["site"])
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
    """Write ``sae`` into ``folder``, which is created if it does not exist.

    Raises ValueError for NaN weights, and for what :func:`read` refuses.
    """
    check_finite(sae.state_dict())
    layer = sae.provenance.get("layer")
    config = {"format": NAME} | ({} if layer is None else {"layer": layer}) | sae.config()
    text = json.dumps(config, indent=2) + "\n"
    _check_origin(Config(json.loads(text), folder / CONFIG))
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses tensors that share memory (W_enc may be W_dec.T)
    tensors = {name: t.contiguous().clone() for name, t in sae.state_dict().items()}
    with whole(folder / CONFIG) as unfinished:  # which is there once the weights are
        unfinished.write_text(text, encoding="utf-8")
        write_tensors(folder / WEIGHTS, tensors)


def _config(contents: Contents) -> Config | None:
    config = contents.configs.get(CONFIG)
    return config if config is not None and config.get("format") == NAME else None


def _check_origin(config: Config) -> None:
    """Require that the block and the provenance have the form in which they are written. Null is as if missing."""
    _check_form("layer", config.get("layer"), BLOCK, config.file)
    provenance = config.field("provenance", dict) if "provenance" in config else {}
    for name, form in PROVENANCE.items():
        _check_form(f"provenance.{name}", provenance.get(name), form, config.file)


def _check_form(name: str, value: Any, form: str, file: Path) -> None:
    fits = {
        TEXT: isinstance(value, str),
        TEXTS: isinstance(value, list) and all(isinstance(one, str) for one in value),
        OBJECT: isinstance(value, dict),
        BLOCK: type(value) is int and value >= 0,
    }
    if value is not None and not fits[form]:
        raise ValueError(f"path: expected {name} in {file} to be {form}, got {short(value)}")
