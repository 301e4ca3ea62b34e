"""fastfg's own format: ``config.json`` beside ``sae.safetensors``. It round-trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastfg.sae.model import SparseAutoencoder

FILES = "fastfg: config.json + sae.safetensors"
FORMAT = "fastfg"


def reads(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("format") == FORMAT


def read(folder: Path) -> SparseAutoencoder:
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    arguments: dict[str, Any] = {name: config[name] for name in ("activation", "k", "normalize", "subtract_b_dec")}
    return SparseAutoencoder(**arguments | load_file(folder / "sae.safetensors"))


def write(sae: SparseAutoencoder, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in sae.state_dict().items()}, folder / "sae.safetensors")
    (folder / "config.json").write_text(json.dumps({"format": FORMAT} | sae.config(), indent=2) + "\n")
