"""HyperKvasir: endoscopic images of the gut, with classes for a part of them and masks for polyps.

Borgli et al., "HyperKvasir, a comprehensive multi-class image and video dataset for gastrointestinal endoscopy",
Scientific Data 7 (2020).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastfg.data.layouts import Dropped, images_in, masks_of, need_folders, root_of, unexpected
from fastfg.data.manifest import Manifest, build
from fastfg.data.splits import split

NAME = "hyperkvasir"
PUBLISHED = "published at https://datasets.simula.no/hyper-kvasir"
LANDMARKS = {
    "cecum": "lower-gi-tract",
    "ileum": "lower-gi-tract",
    "retroflex-rectum": "lower-gi-tract",
    "pylorus": "upper-gi-tract",
    "retroflex-stomach": "upper-gi-tract",
    "z-line": "upper-gi-tract",
}
KIND = "anatomical-landmarks"
INSIDE = 128  # the least grey value inside a polyp's mask


def prepare(
    source: str | Path,
    *,
    part: str = "landmarks",
    masks: str | Path | None = None,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Manifest:
    """The manifest of the six anatomical landmarks, or of the segmented polyps.

    Expected for ``landmarks``: ``labeled-images/lower-gi-tract/anatomical-landmarks/{cecum,ileum,retroflex-rectum}``
    and ``labeled-images/upper-gi-tract/anatomical-landmarks/{pylorus,retroflex-stomach,z-line}``. For ``polyps``:
    ``segmented-images/{images,masks}``.

    The archive has no splits for this and does not say which patient an image is of, so each image is split by itself,
    class by class, by the hash of seed and key. Images of one patient, and frames that are almost the same, can be in
    two splits: accuracy on the test split can be too high.

    Args:
        source: the archive, or the folder ``labeled-images`` or ``segmented-images``.
        part: ``landmarks`` or ``polyps``.
        masks: for ``polyps``, a folder to write masks to. The archive's are JPEG, whose compression blurs the border;
            they are written as PNG with 255 where the grey value is at least 128. None: the manifest has no masks.
        validation, test, seed: of the split.

    Raises FileNotFoundError for missing parts, with where the archive is published, and ValueError for other names.
    """
    if part not in ("landmarks", "polyps"):
        raise ValueError(f"part: expected landmarks or polyps, got {part!r}")
    made = _landmarks(Path(source)) if part == "landmarks" else _polyps(Path(source), masks)
    table = split(made.table, validation=validation, test=test, seed=seed, by_label=True)
    return made._replace(table=table)


def _landmarks(source: Path) -> Manifest:
    above = source / "labeled-images"
    tracts = tuple(dict.fromkeys(LANDMARKS.values()))
    root = root_of(above if above.is_dir() else source, tracts, f"{NAME}, labeled-images", PUBLISHED)
    need_folders(root, (f"{tract}/{KIND}/{label}" for label, tract in LANDMARKS.items()), NAME, PUBLISHED)
    rows, dropped = [], Dropped()
    for tract in tracts:
        unexpected(root / tract / KIND, (label for label, own in LANDMARKS.items() if own == tract), dropped)
    for label, tract in LANDMARKS.items():
        images = images_in(root / tract / KIND / label, dropped)
        rows += [{"path": path, "label": label, "split": "train"} for path in images]
    return build(rows, dropped)


def _polyps(source: Path, target: str | Path | None) -> Manifest:
    above = source / "segmented-images"
    kinds = ("images", "masks")
    root = root_of(above if above.is_dir() else source, kinds, f"{NAME}, segmented-images", PUBLISHED)
    dropped = Dropped()
    unexpected(root, (*kinds, "bounding-boxes.json"), dropped)
    images = images_in(root / "images", dropped)
    masks = masks_of(images, root / "masks", dropped)
    if target is not None:
        masks = {image: _without_loss(mask, Path(target)) for image, mask in masks.items()}
    rows = [
        {"path": path, "label": "polyp", "split": "train", "mask": masks.get(path) if target is not None else None}
        for path in images
    ]
    return build(rows, dropped)


def _without_loss(mask: Path, folder: Path) -> Path:
    """Write a JPEG mask as PNG with 0 and 255."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{mask.stem}.png"
    with Image.open(mask) as image:
        values = np.asarray(image.convert("L"))
    hidden = folder / f".{mask.stem}.png"
    Image.fromarray(np.where(values >= INSIDE, 255, 0).astype(np.uint8)).save(hidden)
    hidden.replace(target)
    return target
