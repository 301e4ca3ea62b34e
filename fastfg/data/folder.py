"""Images from files, in batches; a file that can't be read is named, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
Transform = Callable[[Image.Image], Tensor]


class FileError(NamedTuple):
    """A file that could not be read, and why."""

    path: Path
    message: str


class Batch(NamedTuple):
    """Images [b, C, H, W] with their files; ``errors`` of the files that were passed over on the way."""

    paths: list[Path]
    images: Tensor
    errors: list[FileError]


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The image files among ``paths``, folders searched to the bottom, in order of their names.

    Raises FileNotFoundError for a path that does not exist, or where there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"images: expected a file or folder, got {path}, which does not exist")
    if not found:
        raise FileNotFoundError(f"images: expected files named {', '.join(sorted(SUFFIXES))}, found none")
    return found


def batches(paths: Sequence[Path], transform: Transform, batch_size: int) -> Iterator[Batch]:
    """The images of ``paths`` in full batches, as far as they can be read; errors come with the next batch.

    The last batch may be empty, where only errors were left.
    """
    kept: list[Path] = []
    images: list[Tensor] = []
    errors: list[FileError] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(transform(image))
            kept.append(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            errors.append(FileError(path, f"{type(error).__name__}: {error}"))
        if len(images) == batch_size:
            yield Batch(kept, torch.stack(images), errors)
            kept, images, errors = [], [], []
    if images or errors:
        yield Batch(kept, torch.stack(images) if images else torch.empty(0), errors)
