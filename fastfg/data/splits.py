"""Manifests of folders with one folder per class, and deterministic splits that keep groups together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.data.folder import find_images
from fastfg.data.manifest import Manifest, build, hash_order

if TYPE_CHECKING:
    import pandas as pd

SPLIT_FOLDERS = {  # names of folders, in lower case: the split
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


def from_folder(
    folder: str | Path,
    *,
    group: Callable[[Path], str] | Mapping[str, str] | None = None,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Manifest:
    """The manifest of a folder with one folder per class, whose name is the label.

    If the folder holds ``train``, ``val`` and ``test`` (also ``validation``, ``valid``, ``training``, ``testing``),
    with the folders of the classes inside them, these splits are kept as they are. Otherwise :func:`split` makes them.

    Args:
        folder: searched as :func:`fastfg.data.find_images` does; what it skips is in ``dropped`` with the reason.
        group: gives the group of an image, such as the patient, from its path: a function, or a mapping from the
            file's name. Images of one group are put into one split. Without it, each image is its own group, and
            photographs of one patient can be in two splits.
        validation, test: shares of the images; ignored for a folder with splits of its own.
        seed: of the splits.

    Raises FileNotFoundError if there is no folder, and ValueError for a folder without classes, or with folders for
    splits and others beside them.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from fastfg.data.splits import from_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(20):
    ...         file = Path(folder, "dark" if i < 10 else "light", f"{i}.png")
    ...         file.parent.mkdir(exist_ok=True)
    ...         Image.new("L", (8, 8), 12 * i).save(file)
    ...     table, dropped = from_folder(folder)
    >>> table["split"].value_counts().to_dict(), len(dropped)
    ({'train': 14, 'validation': 3, 'test': 3}, 0)
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: expected a folder, got {root}")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = [name for name in folders if name.lower() in SPLIT_FOLDERS]
    if splits and splits != folders:
        others = ", ".join(name for name in folders if name not in splits)
        raise ValueError(
            f"folder: expected folders of splits or of classes in {root}, got {', '.join(splits)} with {others}"
        )
    found = find_images([root])
    rows, dropped = [], [(error.path, error.message) for error in found.skipped]
    depth = 2 if splits else 1  # of the folders whose names tell split and label
    for path in found.paths:
        parts = path.relative_to(root).parts
        if len(parts) <= depth:
            dropped.append((path, "not in the folder of a class"))
            continue
        part = SPLIT_FOLDERS[parts[0].lower()] if splits else "train"
        rows.append({"path": path, "label": parts[depth - 1], "split": part, "group": _group_of(path, group)})
    if not rows:
        raise ValueError(f"folder: expected a folder per class with images in {root}, got none")
    made = build(rows, dropped)
    return made if splits else made._replace(table=split(made.table, validation=validation, test=test, seed=seed))


def split(
    table: pd.DataFrame, *, validation: float = 0.15, test: float = 0.15, seed: int = 0, by_label: bool = False
) -> pd.DataFrame:
    """The manifest with new splits. All images of a group are in one split.

    Groups (and images without a group, each by itself) are put in the order of the hash of seed and group (or key).
    The first ones are for ``test``, until they hold its share of the images, the next ones for ``validation``, and the
    rest for ``train``. The order of the table and the labels play no part:
    :func:`fastfg.data.manifest.class_counts` says how many images of each class a split has got.

    ``by_label`` takes the shares of each label by itself, so that a rare class is in each split; then no image may
    have a group.

    Raises ValueError for shares that are not at least 0 and together below 1, and if a split gets no image.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}: expected a share of at least 0 and below 1, got {share}")
    if validation + test >= 1:
        raise ValueError(f"test: expected shares that leave images for training, got {validation} and {test}")
    if by_label and (table["group"] != "").any():
        raise ValueError("by_label: expected images without a group, as a group can have several labels")
    table = table.copy()
    units = table["group"].where(table["group"] != "", "key\n" + table["key"])  # a group's name may be that of a key
    of_unit: dict[str, str] = {}
    for _, part in units.groupby(table["label"]) if by_label else [("", units)]:
        wanted = {"test": round(test * len(part)), "validation": round(validation * len(part))}
        of_unit |= _deal(part, wanted, seed)
    table["split"] = [of_unit.get(unit, "train") for unit in units]
    needed = {"train": 1, "validation": validation, "test": test}
    lacking = [name for name, share in needed.items() if share and not (table["split"] == name).any()]
    if lacking:
        raise ValueError(
            f"split: expected enough groups for images in each split, got none for {' and '.join(lacking)} "
            f"({units.nunique()} groups with {len(table)} images)"
        )
    return table


def not_trained_on(table: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """The manifest without the images of its validation and test split that ``trained`` has as training images.

    Use it if a model that was trained on one manifest is judged on another one of the same source. Images are the same
    if their files are; a group of ``trained`` is not looked at.

    Raises ValueError if no image is left.
    """
    keys = set(trained.loc[trained["split"] == "train", "key"])
    left = table[(table["split"] == "train") | ~table["key"].isin(keys)]
    if left.empty:
        raise ValueError(f"trained: expected images that it does not train on, got none of {len(table)}")
    return left.reset_index(drop=True)


def _deal(units: pd.Series, wanted: Mapping[str, int], seed: int) -> dict[str, str]:
    """{unit: split} for the first ones in the order of their hash, until each split has its number of images."""
    sizes, of_unit, order = units.value_counts(), {}, hash_order(units, seed)
    for name, n in wanted.items():
        taken = 0
        while taken < n and order:
            taken += int(sizes[order[0]])
            of_unit[order.pop(0)] = name
    return of_unit


def _group_of(path: Path, group: Any) -> str:
    if group is None:
        return ""
    name = group(path) if callable(group) else group.get(path.name)
    if not isinstance(name, str) or not name:
        raise ValueError(f"group: expected a name for each image, got {name!r} for {path}")
    return name
