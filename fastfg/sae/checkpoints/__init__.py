"""Load SAEs from disk; one file per format. No other SAE library is imported, and no pickled code is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfg.sae.checkpoints import own, prisma
from fastfg.sae.checkpoints.files import CONFIG, read_config
from fastfg.sae.checkpoints.names import block_in_config, block_of, blocks_in_name
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import integers

FORMATS = (own, prisma)  # each has WEIGHTS, FILES, reads(folder) -> bool and read(folder) -> SparseAutoencoder


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Load one SAE from its folder, or from the weights or config file in it.

    Raises FileNotFoundError for a path that does not exist, and ValueError that names the file and what is wrong with
    it. A file of no known format is refused; no other file is read instead.
    """
    folder, form = _locate(Path(path))
    try:
        return form.read(folder)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if str(folder) in text else f"path: {folder}: {text}") from error


def load_saes(
    source: str | Path | Mapping[int, str | Path], layers: int | Iterable[int] | None = None
) -> dict[int, SparseAutoencoder]:
    """Load SAEs by block: ``{block: SparseAutoencoder}``.

    Args:
        source: a folder with one folder per block, whose config or name contains the block (``layer_2``, ``l2``,
            ``blocks.2.hook_resid_post``, ``2``); the folder or a file of one SAE; or a mapping ``{block: path}``.
        layers: the 0-based blocks to load; None loads all. Required for a single SAE whose files do not contain its
            block.

    Raises FileNotFoundError or ValueError that names what is missing and what was found.
    """
    layers = None if layers is None else integers("layers", layers)
    paths = _given(source) if isinstance(source, Mapping) else _find(Path(source), layers)
    wanted = sorted(paths) if layers is None else list(layers)
    missing = [block for block in wanted if block not in paths]
    if missing:
        raise ValueError(f"layers: expected blocks among {sorted(paths)} of {source}, got {missing}")
    return {block: load_sae(paths[block]) for block in wanted}


def _locate(path: Path) -> tuple[Path, Any]:
    """The folder and the format of the SAE at ``path``."""
    if not path.exists():
        raise FileNotFoundError(f"path: expected an SAE file or folder, got {path}, which does not exist")
    folder = path if path.is_dir() else path.parent
    known = "; ".join(form.FILES for form in FORMATS)
    for form in FORMATS:
        if form.reads(folder):
            if path.is_file() and path.name not in (CONFIG, form.WEIGHTS):
                raise ValueError(
                    f"path: expected an SAE folder ({known}) or one of these files, got {path}, which is not read: "
                    f"its folder's SAE is in {form.WEIGHTS}"
                )
            return folder, form
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"path: expected an SAE folder ({known}) or one of these files, got {path}; its folder has {found}"
    )


def _given(source: Mapping[int, str | Path]) -> dict[int, Path]:
    wrong = [block for block in source if isinstance(block, bool) or not isinstance(block, int) or block < 0]
    if wrong:
        raise ValueError(f"source: expected blocks from 0 on as keys, got {wrong}")
    return {block: Path(path) for block, path in source.items()}


def _is_sae(folder: Path, layers: Sequence[int] | None) -> bool:
    """Whether ``folder`` has files of an SAE. They may be incomplete if the SAE may be one of ``layers``."""
    has_config, has_weights = (folder / CONFIG).is_file(), any((folder / form.WEIGHTS).is_file() for form in FORMATS)
    blocks = blocks_in_name(folder.name)
    if blocks and layers is not None and not blocks & set(layers):
        return _is_complete(folder)
    if blocks or (has_config and has_weights):
        return has_config or has_weights
    try:
        config = read_config(folder) if has_config else {}
    except ValueError:
        return False  # nothing says that this file belongs to an SAE
    return config.get("format") == own.FORMAT or block_in_config(config, folder) is not None


def _is_complete(folder: Path) -> bool:
    try:
        return any(form.reads(folder) for form in FORMATS)
    except ValueError:
        return False


def _find(source: Path, layers: Sequence[int] | None) -> dict[int, Path]:
    """The SAEs of ``source`` by block: the single SAE in it, or the SAEs in its folders."""
    if not source.is_dir() or any(form.reads(source) for form in FORMATS):
        folder, _ = _locate(source)
        block = block_of(folder)
        if layers is not None and len(layers) == 1 and block is None:
            block = layers[0]
        if block is None:
            raise ValueError(f"layers: expected the one block that {source} belongs to, got {layers}")
        return {block: source}
    found: dict[int, Path] = {}
    unknown = []
    for child in sorted(p for p in source.iterdir() if p.is_dir() and _is_sae(p, layers)):
        _locate(child)
        block = block_of(child)
        if block is None:
            unknown.append(child.name)
        elif block in found:
            raise ValueError(f"source: expected one SAE per block, got {found[block]} and {child} for block {block}")
        else:
            found[block] = child
    if unknown and (layers is None or not set(layers) <= set(found)):
        raise ValueError(f"source: expected the block in the config or the name of each SAE in {source}, got {unknown}")
    if not found:
        raise ValueError(f"source: expected SAE folders named by block under {source}, got none")
    return found
