"""fastfg's own format: ``config.json`` and ``sae.safetensors``. A saved SAE is read back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastfg.sae.checkpoints.files import CONFIG, field, pick, read_config, read_tensors
from fastfg.sae.model import ACTIVATION_TENSORS, SparseAutoencoder, check_finite

WEIGHTS = "sae.safetensors"
FILES = f"fastfg: {CONFIG} + {WEIGHTS}"
FORMAT = "fastfg"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def reads(folder: Path) -> bool:
    """Whether the folder's config says that it is of this format."""
    return (folder / CONFIG).is_file() and read_config(folder).get("format") == FORMAT


def read(folder: Path) -> SparseAutoencoder:
    """The SAE in ``folder``. Raises ValueError that names the file and what is wrong with it."""
    from safetensors.torch import load_file

    config, file = read_config(folder), folder / WEIGHTS
    arguments: dict[str, Any] = {name: field(config, name, str, folder) for name in ("activation", "normalize")}
    arguments["subtract_b_dec"] = field(config, "subtract_b_dec", bool, folder)
    if config.get("k") is not None:
        arguments["k"] = field(config, "k", int, folder)
    state = read_tensors(file, load_file)
    unknown = sorted(set(state) - {*TENSORS, *ACTIVATION_TENSORS})
    if unknown:
        raise ValueError(f"path: expected tensors among {(*TENSORS, *ACTIVATION_TENSORS)} in {file}, got {unknown}")
    sae = SparseAutoencoder(**arguments, **pick(state, {*TENSORS, *state}, file))
    for name, size in (("d", sae.d), ("n_features", sae.n_features)):
        if field(config, name, int, folder) != size:
            raise ValueError(f"path: expected {name}={config[name]} in {file}, as {CONFIG} says, got {size}")
    return sae


def write(sae: SparseAutoencoder, folder: Path) -> None:
    """Write ``sae`` into ``folder``, which is created if it does not exist. ValueError for NaN weights."""
    from safetensors.torch import save_file

    check_finite(sae.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses tensors that share memory (W_enc may be W_dec.T)
    save_file({name: t.contiguous().clone() for name, t in sae.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"format": FORMAT} | sae.config(), indent=2) + "\n", encoding="utf-8")
