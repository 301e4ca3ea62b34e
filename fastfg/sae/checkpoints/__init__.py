"""Load SAEs from disk. No other SAE library is imported, and no pickled code is run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfg.sae.checkpoints.locate import CONFIGS, Found, holds_one, is_complete, known, locate, read_config, weights_in
from fastfg.sae.checkpoints.names import block_of, blocks_in_name
from fastfg.sae.formats.common import Given
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import integers


def load_sae(path: str | Path, **overrides: Any) -> SparseAutoencoder:
    """Load one SAE from its folder, or from the weights or config file in it.

    ``overrides``: as in :func:`load_saes`. Raises FileNotFoundError for a path that does not exist, and ValueError that
    names the file and what is wrong with it. A file of no known format is refused; no other file is read instead.
    """
    return _read(locate(_path("path", path)), overrides)


def load_saes(
    source: str | Path | Mapping[int, str | Path], layers: int | Iterable[int] | None = None, **overrides: Any
) -> dict[int, SparseAutoencoder]:
    """Load SAEs by block: ``{block: SparseAutoencoder}``, from the files of any format in ``docs/saes.md``.

    Args:
        source: a folder with one folder per block, whose config or name contains the block (``layer_2``, ``l2``,
            ``blocks.2.hook_resid_post``, ``2``); the folder or a file of one SAE; or a mapping ``{block: path}``, whose
            blocks are those that the files say, if they say any.
        layers: the 0-based blocks to load; None loads all. Required for a single SAE whose files do not contain its
            block.
        overrides: what the files do not say, the same for all SAEs: ``site`` (``"resid_post"``, the block's output),
            ``model``, ``tokens`` (``patches`` or ``all``), ``activation``, ``k``, ``threshold``, ``post``,
            ``normalize``, ``subtract_b_dec``, ``input_mean`` ([d] or 0), ``input_scale``, ``decoder_norm``,
            ``row_norm``, ``delta``. What a format needs and its files leave out is an error that names the override.
            So is an override that contradicts the files, or that they leave no use for.

    Raises FileNotFoundError, TypeError or ValueError that names what is missing and what was found: an SAE of another
    site than a block's output, of class tokens alone, or of another ``model`` than the given one is refused.

    >>> import tempfile, torch, fastfg
    >>> W_dec = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    >>> folder = tempfile.mkdtemp()
    >>> fastfg.SparseAutoencoder(W_dec.T, torch.zeros(64), W_dec, torch.zeros(16), k=8).save(f"{folder}/layer_2")
    >>> fastfg.load_saes(folder)[2].k
    8
    """
    saes = {}
    for block, path in find_saes(source, layers).items():
        saes[block] = load_sae(path, **overrides)
        said = saes[block].provenance.get("layer")
        if said not in (None, block):
            raise ValueError(f"source: expected block {said} for {path}, as its files say, got {block}")
        saes[block].provenance["layer"] = block
    return saes


def find_saes(
    source: str | Path | Mapping[int, str | Path], layers: int | Iterable[int] | None = None
) -> dict[int, Path]:
    """{block: path} of the SAEs that :func:`load_saes` loads. Only as much of the files is read as finds them.

    Raises FileNotFoundError, TypeError or ValueError as it does.
    """
    layers = None if layers is None else integers("layers", layers)
    paths = _given(source) if isinstance(source, Mapping) else _find(_path("source", source), layers)
    wanted = sorted(paths) if layers is None else list(layers)
    if missing := [block for block in wanted if block not in paths]:
        raise ValueError(f"layers: expected blocks among {sorted(paths)} of {source}, got {missing}")
    return {block: paths[block] for block in wanted}


def _read(found: Found, overrides: Mapping[str, Any]) -> SparseAutoencoder:
    file = found.contents.file
    given = Given(overrides, file)
    try:
        sae: SparseAutoencoder = found.form.read(found.contents, given)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if str(file.parent) in text else f"path: {file}: {text}") from error
    return sae


def _given(source: Mapping[int, str | Path]) -> dict[int, Path]:
    wrong = [block for block in source if isinstance(block, bool) or not isinstance(block, int) or block < 0]
    if wrong:
        raise ValueError(f"source: expected blocks from 0 on as keys, got {wrong}")
    return {block: _path(f"source[{block}]", path) for block, path in source.items()}


def _path(name: str, given: object) -> Path:
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {given!r:.80}")
    if given == "":  # which would be the current folder
        raise ValueError(f"{name}: expected a path, got an empty text")
    return Path(given)


def _is_sae(folder: Path, layers: Sequence[int] | None) -> bool:
    """Whether ``folder`` has files of an SAE. They may be incomplete if the SAE may be one of ``layers``."""
    has_config = any((folder / name).is_file() for name in CONFIGS)
    blocks = blocks_in_name(folder.name)
    if blocks and layers is not None and not blocks & set(layers):
        return is_complete(folder)
    if blocks:
        return has_config or bool(weights_in(folder))
    return is_complete(folder) or any(_names_a_block(folder / name) for name in CONFIGS)


def _names_a_block(file: Path) -> bool:
    """Whether a config is that of an SAE, even if the weights beside it are missing or damaged."""
    try:
        config = read_config(file) if file.is_file() else None
    except ValueError:
        return False  # nothing says that this file belongs to an SAE
    return config is not None and (config.get("format") == "fastfg" or config.has("hook_point_layer", "layer"))


def _find(source: Path, layers: Sequence[int] | None) -> dict[int, Path]:
    """The SAEs of ``source`` by block: the single SAE in it, or the SAEs in its folders."""
    if not source.is_dir() or holds_one(source):
        block = _block(source)
        if layers is not None and len(layers) == 1 and block is None:
            block = layers[0]
        if block is None:
            raise ValueError(f"layers: expected the one block that {source} belongs to, got {layers}")
        return {block: source}
    found: dict[int, Path] = {}
    unknown = []
    for child in sorted(p for p in source.iterdir() if p.is_dir() and _is_sae(p, layers)):
        block = _block(child)
        if block is None:
            unknown.append(child.name)
        elif block in found:
            raise ValueError(f"source: expected one SAE per block, got {found[block]} and {child} for block {block}")
        else:
            found[block] = child
    if unknown and (layers is None or not set(layers) <= set(found)):
        raise ValueError(f"source: expected the block in the config or the name of each SAE in {source}, got {unknown}")
    if not found:
        names = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"source: expected SAE folders named by block under {source}, or the files of one SAE ({known()}), "
            f"got {names}{_meant(source, layers)}"
        )
    return found


def _meant(source: Path, layers: Sequence[int] | None) -> str:
    """A hint at the folders of ``source`` that have SAE folders, such as ``trained`` of ``fastfg train-sae``."""
    inside = [path for path in sorted(source.iterdir()) if path.is_dir()]
    inside = [path for path in inside if any(_is_sae(child, layers) for child in path.iterdir() if child.is_dir())]
    inside.sort(key=lambda path: path.name != "trained")
    return f" (did you mean {' or '.join(str(path) for path in inside[:3])}?)" if inside else ""


def _block(path: Path) -> int | None:
    found = locate(path)
    return block_of(found.block(), found.contents.file.parent)
