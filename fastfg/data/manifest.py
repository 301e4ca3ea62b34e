"""The manifest of a study: a table with one row per image, which says what it is and which split it is in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfg.files import whole

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("key", "path", "label", "split", "group", "mask", "sha256")
MAY_BE_EMPTY = ("group", "mask")
SPLITS = ("train", "validation", "test")
TABLES = (".csv", ".parquet")  # suffixes
KEY_DIGITS = 16
CHUNK = 1 << 20  # bytes that are hashed at a time


class Manifest(NamedTuple):
    """A manifest, and the files that are not in it.

    ``table`` has the columns :data:`COLUMNS`, sorted by key. ``dropped`` has the columns ``path`` and ``reason``.
    """

    table: pd.DataFrame
    dropped: pd.DataFrame


def read_manifest(file: str | Path, *, check_files: bool = True) -> pd.DataFrame:
    """Read a manifest and check it. The file is Parquet or CSV, with these columns, all of them text:

    - ``key``: the first 16 hex digits of ``sha256``; unique.
    - ``path``: the image file. A relative path starts at the manifest's folder. It is returned as an absolute path.
    - ``label``: the name of the class.
    - ``split``: ``train``, ``validation`` or ``test``.
    - ``group``: what belongs together, such as the patient, and may not be in two splits. Empty if it is not known.
    - ``mask``: the file of a mask, relative as ``path``; empty if there is none.
    - ``sha256``: the hash of the image file's content.

    Args:
        file: a ``.parquet`` or ``.csv`` file.
        check_files: require that the image and mask files exist. Their content is not read:
            :func:`verify_content` does that.

    Returns a table sorted by key. Raises FileNotFoundError if ``file`` or files that it names are missing, and
    ValueError that names the column for a table that breaks these rules.
    """
    file = Path(file)
    table = check_manifest(read_table(file), str(file))
    root = file.parent.resolve()
    for column in ("path", "mask"):
        table[column] = [str(root / name) if name else "" for name in table[column]]
    if check_files:
        _check_files(table, file)
    return table


def write_manifest(table: pd.DataFrame, file: str | Path) -> Path:
    """Write a manifest as Parquet or CSV, whole or not at all. Returns the file.

    Paths below the folder of ``file`` are written relative to it, so that the folder can be moved; other paths are
    absolute. Raises ValueError for a table that :func:`read_manifest` would refuse.
    """
    file = Path(file)
    suffix = _suffix(file)
    table = check_manifest(table, "table")
    file.parent.mkdir(parents=True, exist_ok=True)
    for column in ("path", "mask"):
        table[column] = [_relative(name, file.parent) for name in table[column]]
    with whole(file) as unfinished:
        if suffix == ".csv":
            table.to_csv(unfinished, index=False)
        else:
            table.to_parquet(unfinished, index=False)
    return file


def read_table(file: Path, name: str = "manifest") -> pd.DataFrame:
    """The table in a .csv or .parquet file. Values of a CSV are text: a label ``NA`` or ``01`` stays as it is. A mark
    of UTF-8 at its start, as editors on Windows write it, is no part of the first column's name.

    Raises FileNotFoundError for a missing file, and ValueError for one that can't be read as a table. ``name`` is what
    the messages call the file.
    """
    pd = _pandas()
    suffix = _suffix(file, name)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {file}, which is none")
    try:
        if suffix == ".csv":
            return pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        return pd.read_parquet(file)
    except Exception as error:  # for damaged files, the readers can raise anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name}: expected a table in {file}, got {type(error).__name__}: {reason}") from error


def check_manifest(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A copy of the columns :data:`COLUMNS`, sorted by key. Raises ValueError if they break the manifest's rules.

    ``name`` is what the messages call the table.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"manifest: expected the columns {', '.join(COLUMNS)} in {name}, got none for {missing}")
    table = table[list(COLUMNS)].copy()
    if table.empty:
        raise ValueError(f"manifest: expected at least one image in {name}, got none")
    for column in COLUMNS:
        _check_text(table, column, name)
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise ValueError(f"split: expected {', '.join(SPLITS)} in {name}, got {unknown[:3]}")
    bad = table[~table["sha256"].str.fullmatch("[0-9a-f]{64}")]
    if len(bad):
        raise ValueError(f"sha256: expected 64 hex digits in {name}, got {bad['sha256'].iloc[0]!r}")
    bad = table[table["key"] != table["sha256"].str[:KEY_DIGITS]]
    if len(bad):
        key, sha256 = bad[["key", "sha256"]].iloc[0]
        raise ValueError(f"key: expected the first {KEY_DIGITS} digits of sha256, {sha256[:KEY_DIGITS]}, got {key!r}")
    _check_once(table, name)
    return table.sort_values("key", ignore_index=True)


def verify_content(table: pd.DataFrame) -> None:
    """Read the image files of a manifest from :func:`read_manifest`, and compare their hashes with ``sha256``.

    Raises ValueError that names the first files that have changed.
    """
    found = zip(table["path"], table["sha256"], strict=True)
    changed = [path for path, sha256 in found if content_hash(Path(path)) != sha256]
    if changed:
        raise ValueError(f"sha256: expected the content that the manifest was made of, got another in {_few(changed)}")


def content_hash(file: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def key_of(sha256: str) -> str:
    """The key of an image whose file has this hash."""
    return sha256[:KEY_DIGITS]


def build(rows: Iterable[Mapping[str, Any]], dropped: Iterable[tuple[Path, str]] = ()) -> Manifest:
    """Make a manifest of ``rows`` with ``path``, ``label``, ``split`` and, if known, ``group`` and ``mask``.

    The files are hashed. Files with the same content are one image: the one in ``test`` is kept, else the one in
    ``validation``, else the first by path, so that no image is in two splits. If the labels of such files differ, none
    of them is kept. Files that can't be read are dropped as well.

    Args:
        rows: one mapping per image file.
        dropped: (path, reason) of files that were left out before.

    Raises ValueError if no image is left.
    """
    pd = _pandas()
    left_out = [(_shown(path), reason) for path, reason in dropped]
    same: dict[str, list[dict[str, str]]] = {}
    for given in rows:
        path = Path(given["path"])
        row = {column: str(given.get(column) or "") for column in COLUMNS} | {"path": str(path.absolute())}
        try:
            row["path"].encode("utf-8")
            row["sha256"] = content_hash(path)
        except UnicodeEncodeError:
            left_out.append((_shown(path), "a file name that is not UTF-8"))
        except OSError as error:
            left_out.append((_shown(path), f"unreadable file: {error.strerror}"))
        else:
            same.setdefault(row["sha256"], []).append(row | {"key": key_of(row["sha256"])})
    kept = []
    for copies in same.values():
        copies.sort(key=lambda row: (-SPLITS.index(row["split"]), row["path"]))
        first, *others = copies
        if len({row["label"] for row in copies}) > 1:
            labels = ", ".join(sorted({repr(row["label"]) for row in copies}))
            left_out += [(row["path"], f"the same content with different labels: {labels}") for row in copies]
            continue
        kept.append(first)
        left_out += [(row["path"], f"the same content as {first['path']} ({first['split']})") for row in others]
    table = pd.DataFrame(kept, columns=list(COLUMNS))
    return Manifest(
        check_manifest(table, "the images found"), pd.DataFrame(sorted(left_out), columns=["path", "reason"])
    )


def class_counts(table: pd.DataFrame) -> pd.DataFrame:
    """The number of images per label (rows) and split (columns)."""
    pd = _pandas()
    return pd.crosstab(table["label"], table["split"]).reindex(columns=list(SPLITS), fill_value=0)


def with_own_groups(groups: Mapping[str, str]) -> dict[str, str] | None:
    """{image: its group}, where an image without one (``""``) is a group by itself. None if no image has one.

    The group of such an image has a name that begins unlike those of all other groups.

    >>> with_own_groups({"a": "module 1", "b": ""}), with_own_groups({"a": ""})
    ({'a': 'module 1', 'b': 'image b'}, None)
    >>> with_own_groups({"a": "image b", "b": ""})
    {'a': 'image b', 'b': 'single image b'}
    """
    named = {group for group in groups.values() if group}
    if not named:
        return None
    start = "image "
    while any(group.startswith(start) for group in named):
        start = f"single {start}"
    return {image: group or f"{start}{image}" for image, group in groups.items()}


def draw(table: pd.DataFrame, split: str, n: int | None, seed: int = 0, argument: str | None = None) -> pd.DataFrame:
    """The manifest with ``n`` images of ``split``, and the others unchanged. None keeps all.

    Those with the smallest hash of seed and key are kept, so that the same images are drawn whatever the order of the
    table. Raises ValueError if there are fewer, which names the ``argument`` (None: the split).
    """
    if n is None:
        return table
    there = int((table["split"] == split).sum())
    if not 0 <= n <= there:
        raise ValueError(f"{argument or split}: expected 0 to {there} images, as the split has, got {n}")
    order = hash_order(table.loc[table["split"] == split, "key"], seed)
    return table[(table["split"] != split) | table["key"].isin(order[:n])].reset_index(drop=True)


def hash_order(names: Iterable[str], seed: int) -> list[str]:
    """The different ``names`` in an order that the seed decides, by the hash of seed and name."""
    return sorted(set(names), key=lambda name: (hashlib.sha256(f"{seed}\n{name}".encode()).digest(), name))


def _check_text(table: pd.DataFrame, column: str, name: str) -> None:
    """Require text in ``column``, and none that is empty if the column needs a value in each row."""
    values = table[column]
    if column in MAY_BE_EMPTY:
        values = table[column] = values.fillna("")
    other = next((value for value in values if not isinstance(value, str)), None)
    if other is not None:
        raise ValueError(f"{column}: expected text in {name}, got {other!r}")
    empty = table[(values == "") | values.isna()]
    if len(empty) and column not in MAY_BE_EMPTY:
        raise ValueError(f"{column}: expected a value in each row of {name}, got none in row {empty.index[0]}")


def _check_once(table: pd.DataFrame, name: str) -> None:
    """Require that no key and no path is there twice, and that no group is in two splits."""
    for column in ("key", "path"):
        twice = table[table[column].duplicated(keep=False)]
        if len(twice):
            value = twice[column].iloc[0]
            splits = sorted(set(twice.loc[twice[column] == value, "split"]), key=SPLITS.index)
            raise ValueError(f"{column}: expected each image once in {name}, got {value} twice (in {_and(splits)})")
    known = table[table["group"] != ""]
    splits_of = known.groupby("group")["split"].agg(lambda values: sorted(set(values), key=SPLITS.index))
    for group, splits in splits_of.items():
        if len(splits) > 1:
            raise ValueError(f"group: expected each group in one split of {name}, got {group!r} in {_and(splits)}")


def _check_files(table: pd.DataFrame, file: Path) -> None:
    names = [*table["path"], *(mask for mask in table["mask"] if mask)]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(f"manifest: expected the files that {file} names, got none at {_few(missing)}")


def _suffix(file: Path, name: str = "manifest") -> str:
    suffix = file.suffix.lower()
    if suffix not in TABLES:
        raise ValueError(f"{name}: expected a .csv or .parquet file, got {file}")
    return suffix


def _relative(name: str, folder: Path) -> str:
    """``name`` relative to ``folder`` if it is below it, else absolute; an empty name stays empty."""
    if not name:
        return ""
    path = Path(name).absolute()
    for root in (folder.absolute(), folder.resolve()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path)


def _shown(path: str | Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


def _pandas() -> Any:
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; install fastfg with its report extra: pip install 'fastfg[report]'"
        ) from None
    return pd
