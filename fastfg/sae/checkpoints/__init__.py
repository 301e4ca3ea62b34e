"""Reading SAEs from disk, one file a format. Nothing here imports another SAE library or runs pickled code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastfg.sae.checkpoints import own, prisma
from fastfg.sae.model import SparseAutoencoder

FORMATS = (own, prisma)  # each: reads(folder) -> bool, read(folder) -> SparseAutoencoder, layer(config)
BLOCK_IN_NAME = (r"(?:layers?|blocks?)[._-]?(\d+)", r"(\d+)")


def load_sae(path: str | Path) -> SparseAutoencoder:
    """One SAE from its folder, or from a weights or config file inside it."""
    folder = _folder(Path(path))
    for form in FORMATS:
        if form.reads(folder):
            return form.read(folder)
    known = "; ".join(form.FILES for form in FORMATS)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"path: expected an SAE folder ({known}), got {folder} with {found}")


def load_saes(
    source: str | Path | Mapping[int, str | Path], layers: Sequence[int] | None = None
) -> dict[int, SparseAutoencoder]:
    """SAEs by block: ``{block: SparseAutoencoder}``.

    Args:
        source: a folder that holds a folder a block (its name or its config tells which: ``layer_2``,
            ``blocks.2.hook_resid_post``, ``2``); one SAE's folder or file; or a mapping ``{block: path}``.
        layers: the blocks wanted, 0-based; None takes all that are there. Needed with one SAE whose files do
            not tell their block.

    Raises FileNotFoundError or ValueError that names what is missing and what was found.
    """
    if isinstance(source, Mapping):
        paths = {int(block): Path(path) for block, path in source.items()}
    else:
        paths = _find(Path(source), layers)
    wanted = sorted(paths) if layers is None else list(layers)
    missing = [block for block in wanted if block not in paths]
    if missing:
        raise ValueError(f"layers: expected blocks among {sorted(paths)} of {source}, got {missing}")
    return {block: load_sae(paths[block]) for block in wanted}


def _folder(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"path: expected an SAE file or folder, got {path}, which does not exist")
    return path if path.is_dir() else path.parent


def _find(source: Path, layers: Sequence[int] | None) -> dict[int, Path]:
    folder = _folder(source)
    if any(form.reads(folder) for form in FORMATS):
        block = _block(folder)
        if layers is not None and len(layers) == 1 and block is None:
            block = layers[0]
        if block is None:
            raise ValueError(f"layers: expected the one block that {source} belongs to, got {layers}")
        return {block: folder}
    found: dict[int, Path] = {}
    for child in sorted(p for p in folder.iterdir() if p.is_dir() and any(f.reads(p) for f in FORMATS)):
        block = _block(child)
        if block is None:
            continue
        if block in found:
            raise ValueError(f"source: expected one SAE a block, got {found[block]} and {child} for block {block}")
        found[block] = child
    if not found:
        raise ValueError(f"source: expected SAE folders named by block under {folder}, got none")
    return found


def _block(folder: Path) -> int | None:
    """The block an SAE belongs to: what its config says, else the number in its folder's name."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("layer", "hook_point_layer"):
        if isinstance(config.get(key), int):
            return config[key]
    for pattern in BLOCK_IN_NAME:
        match = re.search(pattern, folder.name)
        if match:
            return int(match.group(1))
    return None
