"""The images that a command names: files, folders, and manifests with their labels, masks and groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastfg.cli.console import count, say
from fastfg.data import Found, find_images, path_text
from fastfg.data.manifest import SPLITS, TABLES, read_manifest, verify_content, with_own_groups


class Listed(NamedTuple):
    """The images found, and what manifests say of them, by image. What a manifest leaves empty is not there."""

    found: Found
    labels: dict[Path, str]
    masks: dict[Path, Path]
    groups: dict[Path, str]

    def groups_of(self, images: Sequence[Path]) -> dict[Path, str] | None:
        """{image: its group}; an image without one is a group by itself. None if no image has one."""
        groups = with_own_groups({path_text(image): self.groups.get(image, "") for image in images})
        return None if groups is None else {image: groups[path_text(image)] for image in images}


def find_listed(paths: Iterable[Path], split: str | None) -> Listed:
    """Find the images among ``paths``; those with the suffix of a table are manifests.

    Args:
        split: of the manifests: the images to take; None: all.

    Raises FileNotFoundError and ValueError as :func:`fastfg.data.read_manifest` does, and ValueError for a split
    without a manifest or without images, and for images that have changed since the manifest was made.
    """
    plain: list[Path] = []
    about: dict[str, dict[str, str]] = {"label": {}, "mask": {}, "group": {}}
    manifests = 0
    for path in paths:
        if path.suffix.lower() not in TABLES or path.is_dir():
            plain.append(path)
            continue
        manifests += 1
        table = read_manifest(path)
        sizes = table["split"].value_counts()
        said = ", ".join(f"{name} {sizes[name]:,}" for name in SPLITS if name in sizes)
        if split is not None:
            table = table[table["split"] == split]
        if not len(table):
            raise ValueError(f"split: expected one with images in {path}, got {split!r} (there are {said})")
        verify_content(table)
        say(f"{path}: {count(len(table), 'image')} " + (f"of split {split}" if split else f"of all splits ({said})"))
        images = [Path(name) for name in table["path"]]
        plain += images
        for column, values in about.items():
            own = {path_text(i): value for i, value in zip(images, table[column], strict=True) if value}
            if other := [name for name in own if name in values and values[name] != own[name]]:
                raise ValueError(f"{column}: expected one per image, got another in {path} for {other[0]}")
            values |= own
    if split is not None and not manifests:
        raise ValueError("split: expected it with a manifest (.parquet or .csv) among the images, got none")
    found = find_images(plain)
    labels, masks, groups = (
        {path: values[name] for path in found.paths if (name := path_text(path)) in values} for values in about.values()
    )
    return Listed(found, labels, {path: Path(mask) for path, mask in masks.items()}, groups)


def class_indices(labels: dict[Path, str], images: Sequence[Path], classes: Sequence[str] | None) -> dict[Path, int]:
    """{image: the index of its label in ``classes``}, the names of a model's classes.

    Raises ValueError if the names are not known, and for an image without a label or with another one.
    """
    if classes is None:
        raise ValueError(
            "target: expected --weights of fastfg finetune, which name the classes, with label, got others"
        )
    place = {name: index for index, name in enumerate(classes)}
    for image in images:
        if image not in labels:
            raise ValueError(f"target: expected images of a manifest with label, got {image}, which has no label")
        if labels[image] not in place:
            raise ValueError(f"target: expected labels among {', '.join(classes)}, got {labels[image]!r} for {image}")
    return {image: place[labels[image]] for image in images}
