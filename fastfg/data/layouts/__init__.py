"""The layouts of published data sets, one file per data set, and what their files have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastfg.data.folder import find_images

Dropped = list[tuple[Path, str]]


def root_of(source: Path, parts: Sequence[str], name: str, published: str) -> Path:
    """The folder in ``source`` that holds ``parts``: ``source`` or the end of a chain of single folders below it.

    Archives are often unpacked into a folder of their own name. Raises FileNotFoundError that names what was expected
    and where the archive is published.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{name}: expected a folder, got {source}, which is none ({published})")
    folder = source
    for _ in range(4):
        if all((folder / part).exists() for part in parts):
            return folder
        inside = [path for path in folder.iterdir() if path.is_dir() and path.name != "__MACOSX"]
        same = [path for path in inside if path.name == folder.name]
        inside = same or [path for path in inside if not path.name.startswith(".")]
        if len(inside) != 1:
            break
        folder = inside[0]
    raise FileNotFoundError(f"{name}: expected {' and '.join(parts)} in {source}, got none ({published})")


def need_folders(root: Path, folders: Iterable[str], name: str, published: str) -> None:
    """Raise FileNotFoundError that names the missing ones of ``folders``, and where the archive is published."""
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{name}: expected these folders in {root}, got none: {', '.join(missing[:5])}{more} ({published})"
        )


def images_in(folder: Path, dropped: Dropped) -> list[Path]:
    """The image files of a folder. Other files, and all folders, go to ``dropped``: the layout has none there."""
    found = find_images([folder])
    dropped += [(error.path, error.message) for error in found.skipped]
    here = [path for path in found.paths if path.parent == folder]
    dropped += [(path, f"not directly in {folder.name}") for path in found.paths if path.parent != folder]
    return here


def unexpected(folder: Path, names: Iterable[str], dropped: Dropped) -> None:
    """Name what is in ``folder`` beside ``names``. Hidden files are left out."""
    known = {*names, "__MACOSX"}
    others = sorted(path for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))
    dropped += [(path, "not part of the published layout") for path in others]


def masks_of(images: Sequence[Path], folder: Path, dropped: Dropped) -> dict[Path, Path]:
    """{image: the mask of the same name in ``folder``}. Masks without an image go to ``dropped``."""
    masks = {path.stem: path for path in images_in(folder, dropped)}
    found = {image: masks.pop(image.stem) for image in images if image.stem in masks}
    dropped += [(path, "a mask without an image") for path in masks.values()]
    return found
