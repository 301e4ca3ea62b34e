"""COVID-QU-Ex: chest X-rays of COVID-19, other infections and healthy lungs, with lung and infection masks.

Tahir et al., "COVID-19 infection localization and severity grading from chest X-ray images", Computers in Biology and
Medicine 139 (2021).
"""

from __future__ import annotations

from pathlib import Path

from fastfg.data.layouts import Dropped, images_in, masks_of, need_folders, root_of, unexpected
from fastfg.data.manifest import Manifest, build

NAME = "covid-qu-ex"
PUBLISHED = "published on Kaggle: COVID-QU-Ex by anasmohammedtahir"
SPLITS = {"Train": "train", "Val": "validation", "Test": "test"}
CLASSES = ("COVID-19", "Non-COVID", "Normal")
PARTS = {"lung": "Lung Segmentation Data", "infection": "Infection Segmentation Data"}
MASKS = {"lung": ("lung masks",), "infection": ("infection masks", "lung masks")}  # the first one is the default


def prepare(source: str | Path, *, part: str = "lung", mask: str | None = None) -> Manifest:
    """The manifest of one part of the archive, with the archive's own splits.

    Expected, below ``Lung Segmentation Data`` or ``Infection Segmentation Data``: ``{Train,Val,Test}/{COVID-19,
    Non-COVID,Normal}/images`` and the folders of the masks beside ``images``, with the same file names.

    The archive does not say which patient an image is of, so ``group`` is empty: whether its splits keep patients apart
    is not known. The two parts have splits of their own: an image of the infection part's test split may be a training
    image of the lung part (:func:`fastfg.data.splits.not_trained_on` drops these).

    Args:
        source: the archive, or the folder of the part.
        part: ``lung`` (all images), or ``infection`` (those with infection masks).
        mask: ``lung masks``, or ``infection masks`` of the infection part, its default. Images without a mask have
            an empty ``mask``.

    Raises FileNotFoundError for missing parts, with where the archive is published, and ValueError for other names.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    mask = MASKS[part][0] if mask is None else mask
    if mask not in MASKS[part]:
        raise ValueError(f"mask: expected {' or '.join(MASKS[part])} for part {part!r}, got {mask!r}")
    source = Path(source)
    above = source / PARTS[part]
    root = root_of(above if above.is_dir() else source, tuple(SPLITS), f"{NAME}, {PARTS[part]}", PUBLISHED)
    kinds = ("images", *MASKS[part])
    need_folders(root, (f"{s}/{c}/{k}" for s in SPLITS for c in CLASSES for k in kinds), NAME, PUBLISHED)
    rows, dropped = [], Dropped()
    unexpected(root, SPLITS, dropped)
    for folder, split in SPLITS.items():
        unexpected(root / folder, CLASSES, dropped)
        for label in CLASSES:
            unexpected(root / folder / label, kinds, dropped)
            images = images_in(root / folder / label / "images", dropped)
            masks = masks_of(images, root / folder / label / mask, dropped)
            rows += [{"path": path, "label": label, "split": split, "mask": masks.get(path)} for path in images]
    return build(rows, dropped)
