"""What a user says about the images beside them: masks, found by file name, and groups, from a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from fastfg.data import find_images, path_text
from fastfg.data.manifest import read_table


def find_masks(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """{image: the file in ``folder`` with the image's name, whatever its suffix}. Images without a mask are left out.

    Folders in ``folder`` are searched as well. Raises ValueError if ``folder`` is no folder, if a mask or an image is
    not the only one with its name, and if no image has a mask.
    """
    if not folder.is_dir():
        raise ValueError(f"masks: expected a folder, got {folder}")
    masks: dict[str, Path] = {}
    for mask in find_images([folder]).paths:
        other = masks.setdefault(mask.stem, mask)
        if other != mask:
            raise ValueError(f"masks: expected one file per image name, got {other} and {mask}")
    found: dict[str, Path] = {}
    for image in images:
        other = found.setdefault(image.stem, image) if image.stem in masks else image
        if other != image:
            raise ValueError(
                f"masks: expected images with different names, as masks have them, got {other} and {image}"
            )
    if images and not found:
        raise ValueError(f"masks: expected a file with the name of an image, such as {images[0].stem}.png, in {folder}")
    return {image: masks[stem] for stem, image in found.items()}


def read_groups(file: Path, images: Sequence[Path]) -> dict[Path, str]:
    """{image: its group}, from a CSV or Parquet file with the columns ``image`` and ``group``.

    ``image`` is a file name, or as much of the end of its path as tells the images apart. Raises ValueError if an image
    has no group or several, and if two images have one entry.
    """
    groups = _entries(file)
    found: dict[Path, str] = {}
    owner: dict[tuple[str, ...], Path] = {}
    missing = []
    for image in images:
        parts = PurePath(path_text(image)).parts
        entry = next((parts[n:] for n in range(len(parts)) if parts[n:] in groups), None)
        if entry is None:
            missing.append(image)
            continue
        if entry in owner:
            name = "/".join(entry)
            raise ValueError(
                f"groups: expected names in {file} that tell the images apart, got {name!r} for {owner[entry]} and "
                f"{image} (more of the path does)"
            )
        owner[entry], found[image] = image, groups[entry]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"groups: expected a group in {file} for each image, got none for {missing[0]}{more}")
    return found


def _entries(file: Path) -> dict[tuple[str, ...], str]:
    """{parts of the path: group}, as the file has them."""
    import pandas as pd

    table: Any = read_table(file, "groups")
    if not {"image", "group"} <= set(table.columns):
        raise ValueError(f"groups: expected the columns 'image' and 'group' in {file}, got {list(table.columns)}")
    groups: dict[tuple[str, ...], str] = {}
    for name, group in table[["image", "group"]].itertuples(index=False):
        if pd.isna(group) or str(group) == "":
            raise ValueError(f"groups: expected a group for each image in {file}, got none for {name}")
        if groups.setdefault(PurePath(str(name)).parts, str(group)) != str(group):
            raise ValueError(f"groups: expected one group per image in {file}, got several for {name}")
    return groups
