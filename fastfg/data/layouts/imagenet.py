"""ImageNet: the validation images of ILSVRC 2012 and a subset of them, and training images for SAEs.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 115 (2015).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from fastfg.data.folder import find_images
from fastfg.data.layouts import Dropped
from fastfg.data.manifest import Manifest, build, hash_order

NAME = "imagenet"
PUBLISHED = "published at https://www.image-net.org, ILSVRC 2012"
SEED, TEST, VALIDATION = 2012, 10_000, 1_000  # of the published subset
DATA = "ILSVRC/Data/CLS-LOC"
SYNSETS, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
WNID = re.compile(r"n\d{8}")


def prepare(
    source: str | Path, *, test: int = TEST, validation: int = VALIDATION, train: int = 0, seed: int = SEED
) -> Manifest:
    """The manifest of a subset of ILSVRC's validation images, with WordNet ids as labels.

    Two layouts are read. Kaggle's: ``ILSVRC/Data/CLS-LOC/{train,val}``, where ``val`` holds the files, with
    ``LOC_synset_mapping.txt`` and ``LOC_val_solution.csv`` beside ``ILSVRC``. The plain one: ``val/<wnid>/*.JPEG``
    and, for training images, ``train/<wnid>/*.JPEG``.

    The validation images are put in the order of the hash of seed and image id (:func:`subset`). The first ``test``
    of them are the test split and the next ``validation`` the validation split. Neither is balanced by class. The
    training images are ``train`` of those in ``train``, drawn the same way. ``group`` is empty.

    Args:
        source: the folder that holds ``ILSVRC``, or ``val``. test, validation, train: numbers of images.
        seed: of the subset.

    Raises FileNotFoundError for missing parts, with where the archive is published, and ValueError for files without
    a class or fewer images than asked for.
    """
    for name, n in (("test", test), ("validation", validation), ("train", train)):
        if n < 0:
            raise ValueError(f"{name}: expected at least 0, got {n}")
    source, dropped = Path(source), Dropped()
    kaggle = (source / DATA).is_dir()
    data = source / DATA if kaggle else source
    if not (data / "val").is_dir():
        raise FileNotFoundError(f"{NAME}: expected {DATA}/val or val in {source}, got none ({PUBLISHED})")
    labels, known = _solution(source) if kaggle else _classes(data / "val")
    files = {path.stem: path for path in _images(data / "val", dropped)}
    without = sorted(set(files) - set(labels))
    if without:
        raise ValueError(f"{NAME}: expected a class for each image of {data / 'val'}, got none for {without[0]}")
    rows = []
    for split, names in zip(("test", "validation"), subset(files, test, validation, seed), strict=True):
        rows += [{"path": files[name], "label": labels[name], "split": split} for name in names]
    if train:
        if not (data / "train").is_dir():
            raise FileNotFoundError(f"{NAME}: expected train in {data} for {train} images, got none ({PUBLISHED})")
        of_class = {path.stem: path for path in _images(data / "train", dropped)}
        other = sorted({path.parent.name for path in of_class.values()} - known)
        if other:
            raise ValueError(f"{NAME}: expected classes of {data / 'val'} in {data / 'train'}, got {other[:3]}")
        (names,) = _first(of_class, (train,), seed, "train")
        rows += [{"path": of_class[name], "label": of_class[name].parent.name, "split": "train"} for name in names]
    return build(rows, dropped)


def subset(
    ids: Iterable[str], test: int = TEST, validation: int = VALIDATION, seed: int = SEED
) -> tuple[list[str], list[str]]:
    """The ids of the test and of the validation split, drawn from ``ids``.

    >>> from fastfg.data.layouts.imagenet import subset
    >>> test, validation = subset(f"ILSVRC2012_val_{i:08d}" for i in range(1, 50001))
    >>> len(test), len(validation), len({*test, *validation})
    (10000, 1000, 11000)

    Raises ValueError if there are fewer.
    """
    first, second = _first(ids, (test, validation), seed, "val")
    return first, second


def _first(ids: Iterable[str], sizes: tuple[int, ...], seed: int, what: str) -> list[list[str]]:
    names = hash_order(ids, seed)
    if sum(sizes) > len(names):
        raise ValueError(f"{what}: expected at least {sum(sizes)} images to draw, got {len(names)}")
    drawn = iter(names)
    return [sorted(islice(drawn, size)) for size in sizes]


def _solution(source: Path) -> tuple[dict[str, str], set[str]]:
    """{image id: wnid} from Kaggle's files, and the wnids."""
    for name in (SYNSETS, SOLUTION):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{NAME}: expected {name} in {source}, got none ({PUBLISHED})")
    known = {line.split(" ", 1)[0] for line in (source / SYNSETS).read_text(encoding="utf-8-sig").splitlines() if line}
    with (source / SOLUTION).open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= set(rows[0]):
        raise ValueError(f"{NAME}: expected the columns ImageId and PredictionString in {source / SOLUTION}")
    labels = {row["ImageId"]: row["PredictionString"].split(" ", 1)[0] for row in rows}
    unknown = sorted(set(labels.values()) - known)
    if unknown:
        raise ValueError(f"{NAME}: expected classes of {SYNSETS} in {SOLUTION}, got {unknown[:3]}")
    return labels, known


def _classes(val: Path) -> tuple[dict[str, str], set[str]]:
    """{image id: wnid} from the folders of the classes, and the wnids."""
    folders = [path for path in val.iterdir() if path.is_dir() and WNID.fullmatch(path.name)]
    if not folders:
        raise FileNotFoundError(f"{NAME}: expected folders such as n01440764 in {val}, got none ({PUBLISHED})")
    labels = {path.stem: path.parent.name for path in find_images(folders).paths}
    return labels, {path.name for path in folders}


def _images(folder: Path, dropped: Dropped) -> list[Path]:
    found = find_images([folder])
    dropped += [(error.path, error.message) for error in found.skipped]
    return found.paths
