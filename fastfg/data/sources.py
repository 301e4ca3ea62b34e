"""Images from manifests, folders, tables, WebDataset shards and Hugging Face data sets, in one form."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fastfg.data.folder import find_images
from fastfg.data.image import MAX_ASPECT, MAX_PIXELS, Window, check_limits, read_open_image, readable_suffixes
from fastfg.data.manifest import COLUMNS, SPLITS, key_of, read_manifest, read_table

Transform = Callable[[Image.Image], Tensor]


class Sample(NamedTuple):
    """An image, or the error of one that can't be read.

    ``key`` is that of a manifest: the first 16 hex digits of the SHA-256 of the encoded image; empty if there are no
    bytes. ``label`` is text, empty if it is not known. ``name`` says which file or row it is. With an ``error``, there
    is no ``image``. ``window`` is (low, high) for an image with more than 8 bits, else None.
    """

    key: str
    label: str
    name: str
    image: Tensor | None
    window: Window | None = None
    error: str | None = None


class SampleBatch(NamedTuple):
    """Samples without errors, their images as [b, C, H, W], and the samples with errors between them."""

    samples: list[Sample]
    images: Tensor
    errors: list[Sample]


class Reader:
    """Makes samples of encoded images, by the rules of :func:`fastfg.data.read_image`.

    Args:
        transform: a PIL image -> [C, H, W], the same shape for all.
        window, max_pixels, max_aspect: see :func:`fastfg.data.read_image`.
    """

    def __init__(
        self,
        transform: Transform,
        window: Window | None = None,
        max_pixels: int = MAX_PIXELS,
        max_aspect: float = MAX_ASPECT,
    ) -> None:
        check_limits(window, max_pixels, max_aspect)
        self.transform = transform
        self.options: dict[str, Any] = {"window": window, "max_pixels": max_pixels, "max_aspect": max_aspect}

    def sample(self, data: bytes | Path | None, label: str, name: str) -> Sample:
        """The sample of an encoded image, or of the file that holds it."""
        key = ""
        try:
            if data is None:
                raise ValueError("expected an encoded image, got none")
            data = data.read_bytes() if isinstance(data, Path) else data
            key = key_of(hashlib.sha256(data).hexdigest())
            picture = read_open_image(io.BytesIO(data), Path(name), **self.options)
            return Sample(key, label, name, self.transform(picture.image), picture.window)
        except Exception as error:  # for damaged files, decoders can raise anything; the error is reported
            return Sample(key, label, name, None, None, f"{type(error).__name__}: {error}")


class Files(Dataset[Sample]):
    """Image files with labels."""

    def __init__(self, paths: Sequence[str], labels: Sequence[str], reader: Reader) -> None:
        self.paths, self.labels, self.reader = list(paths), list(labels), reader

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Sample:
        return self.reader.sample(Path(self.paths[i]), self.labels[i], self.paths[i])


def open_manifest(file: str | Path, reader: Reader, split: str | None = None) -> Files:
    """The images of a manifest, or of another CSV or Parquet table with ``path`` and perhaps ``label`` and ``split``.

    Relative paths start at the table's folder. ``split``: one of its splits; None: all.

    Raises ValueError for a table that breaks the rules, and FileNotFoundError for missing files of a manifest.
    """
    file = Path(file)
    table = read_table(file)
    if set(COLUMNS) <= set(table.columns):
        table = read_manifest(file)
    elif "path" not in table.columns:
        raise ValueError(f"manifest: expected a column 'path' in {file}, got {list(table.columns)}")
    if split is not None:
        if split not in SPLITS or "split" not in table.columns:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)} in a table with that column, got {split!r}")
        table = table[table["split"] == split]
    root = file.parent.resolve()
    labels = table["label"].astype(str) if "label" in table.columns else [""] * len(table)
    return Files([str(root / path) for path in table["path"]], list(labels), reader)


def open_folder(folder: str | Path, reader: Reader) -> Files:
    """The images below a folder. The label is the name of the first folder on the way, as in an ``ImageFolder``.

    Raises FileNotFoundError if there is no folder. What :func:`fastfg.data.find_images` skips is left out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: expected a folder, got {root}")
    paths = find_images([root]).paths
    labels = [parts[0] if len(parts := path.relative_to(root).parts) > 1 else "" for path in paths]
    return Files([str(path) for path in paths], labels, reader)


class Shards(IterableDataset[Sample]):
    """The images in WebDataset shards (tar files), each exactly once for any number of workers.

    WebDataset deals shards to workers, so that with fewer shards than workers some have nothing to do. Here each worker
    reads all shards and makes every n-th image, so nothing is dropped or repeated, also across the processes of a
    ``torch.distributed`` run if ``rank`` and ``world_size`` are given.

    Args:
        shards: files, or patterns such as ``photos-{000..003}.tar``. Only local files are read: no URL, no command.
        reader: makes the samples. label: the entry of the label (text), such as ``cls``; None: no labels.
        rank, world_size: which of how many processes this is.

    Raises FileNotFoundError for a shard that is missing, and ModuleNotFoundError with the extra if ``webdataset`` is.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        reader: Reader,
        label: str | None = "cls",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        try:
            from braceexpand import braceexpand
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; install: pip install 'fastfg[webdataset]'") from None
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        self.files = [Path(name).absolute() for shard in shards for name in braceexpand(str(shard))]
        missing = [file for file in self.files if not file.is_file()]
        if missing or not self.files:
            raise FileNotFoundError(
                f"shards: expected local tar files, got none at {missing[0] if missing else shards}"
            )
        self.reader, self.label, self.rank, self.world_size = reader, label, rank, world_size
        self.suffixes = {suffix.lstrip(".") for suffix in readable_suffixes()}

    def __iter__(self) -> Iterator[Sample]:
        import webdataset

        worker = get_worker_info()
        n, i = (1, 0) if worker is None else (worker.num_workers, worker.id)
        first, step = self.rank * n + i, self.world_size * n
        raw = webdataset.WebDataset(
            [str(file) for file in self.files],
            shardshuffle=False,
            nodesplitter=_all,
            workersplitter=_all,
            empty_check=False,
        )
        for entry in islice(raw, first, None, step):
            yield self._sample(entry)

    def _sample(self, entry: Mapping[str, Any]) -> Sample:
        name = f"{Path(entry['__url__']).name}/{entry['__key__']}"
        images = [field for field in entry if field.rpartition(".")[2].lower() in self.suffixes]
        label = entry.get(self.label, b"") if self.label is not None else b""
        text = label.decode("utf-8", "backslashreplace") if isinstance(label, bytes) else str(label)
        if len(images) != 1:
            return Sample(
                "", text, name, None, None, f"expected one image in the sample, got {sorted(images) or 'none'}"
            )
        return self.reader.sample(entry[images[0]], text.strip(), f"{name}.{images[0]}")


class Rows(Dataset[Sample]):
    """The images in a Hugging Face ``datasets.Dataset``.

    Args:
        rows: the data set. It is left as it is: its images are read undecoded, and decoded by ``reader``.
        reader: makes the samples. image, label: the columns; label None: no labels.

    Raises ValueError for columns that it does not have or that are no images.
    """

    def __init__(self, rows: Any, reader: Reader, image: str = "image", label: str | None = "label") -> None:
        self.rows, self.names = _undecoded(rows, image, label)
        self.reader, self.image, self.label = reader, image, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        return _row(self.rows[i], str(i), self)


class StreamedRows(IterableDataset[Sample]):
    """The images in a Hugging Face ``datasets.IterableDataset``. See :class:`Rows`.

    ``datasets`` deals its own shards to workers, each to one, so each image is made once.
    """

    def __init__(self, rows: Any, reader: Reader, image: str = "image", label: str | None = "label") -> None:
        self.rows, self.names = _undecoded(rows, image, label)
        self.reader, self.image, self.label = reader, image, label

    def __iter__(self) -> Iterator[Sample]:
        for i, row in enumerate(self.rows):
            yield _row(row, f"{i} of worker {worker.id}" if (worker := get_worker_info()) else str(i), self)


def read_samples(
    source: Dataset[Sample] | IterableDataset[Sample], batch_size: int, workers: int = 0
) -> Iterator[SampleBatch]:
    """The images of a source in batches. Those that can't be read are in the ``errors`` of their batch.

    Args:
        source: :class:`Files`, :class:`Shards`, :class:`Rows` or :class:`StreamedRows`.
        batch_size: samples per batch, with those that can't be read.
        workers: processes that read images; 0: this one.

    >>> import tempfile, torch
    >>> from PIL import Image
    >>> from fastfg.data.sources import Reader, open_folder, read_samples
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (8, 8), 9).save(f"{folder}/good.png")
    ...     _ = open(f"{folder}/bad.png", "w").write("no image")
    ...     (batch,) = read_samples(open_folder(folder, Reader(lambda image: torch.zeros(1, 8, 8))), batch_size=4)
    >>> batch.images.shape, len(batch.samples), batch.errors[0].error.split(":")[0]
    (torch.Size([1, 1, 8, 8]), 1, 'UnidentifiedImageError')
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    loader: DataLoader[Any] = DataLoader(
        source, batch_size, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    for samples in loader:
        good = [sample for sample in samples if sample.error is None]
        images = torch.stack([sample.image for sample in good]) if good else torch.empty(0)
        yield SampleBatch(good, images, [sample for sample in samples if sample.error is not None])


def _all(shards: Iterator[Any]) -> Iterator[Any]:
    return shards


def _undecoded(rows: Any, image: str, label: str | None) -> tuple[Any, Sequence[str] | None]:
    """The data set with its images as bytes, and the names of its classes if it has them."""
    import datasets

    features = rows.features
    if features is None or not isinstance(features.get(image), datasets.Image):
        raise ValueError(f"image: expected a column of images, got {image!r} (there are: {_columns(rows)})")
    if label is not None and label not in features:
        raise ValueError(f"label: expected a column, or None, got {label!r} (there are: {_columns(rows)})")
    names = getattr(features[label], "names", None) if label is not None else None
    return rows.cast_column(image, datasets.Image(decode=False)), names


def _columns(rows: Any) -> str:
    return ", ".join(rows.column_names or ()) or "none known"


def _row(row: Mapping[str, Any], number: str, source: Rows | StreamedRows) -> Sample:
    value, given = row[source.image], None if source.label is None else row[source.label]
    label = "" if given is None else str(source.names[given]) if source.names is not None else str(given)
    value = value or {}
    data = value.get("bytes")
    path = value.get("path")
    if data is None and path:
        data = Path(path)
    return source.reader.sample(data, label, f"row {number}" + (f" ({path})" if path else ""))
