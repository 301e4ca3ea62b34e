"""Find images in files and folders, and read them in batches. Unreadable files are reported with a reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastfg.data.dicom import why_no_dicom
from fastfg.data.image import (
    MAX_ASPECT,
    MAX_PIXELS,
    Window,
    check_limits,
    is_dicom,
    read_image,
    readable_suffixes,
)
from fastfg.data.mask import read_mask
from fastfg.data.output import MARKER, is_output
from fastfg.data.threads import in_threads

Transform = Callable[[Image.Image], Tensor]


class FileError(NamedTuple):
    """A file or folder that was not read, and why."""

    path: Path
    message: str


class Found(NamedTuple):
    """The image files of a search, sorted by path in each folder, and what was skipped."""

    paths: list[Path]
    skipped: list[FileError]


class Batch(NamedTuple):
    """Images [b, C, H, W] with one path and one window per image, and the errors of unreadable files between them.

    A window is (low, high) for an image with more than 8 bits, and None for other images. ``masks`` [b, H, W] are
    there if they were asked for; ``mask_errors`` then say why an image has no mask, or None.
    """

    paths: list[Path]
    images: Tensor
    errors: list[FileError]
    windows: list[Window | None]
    masks: Tensor | None = None
    mask_errors: Sequence[str | None] = ()


def find_images(paths: Iterable[Path]) -> Found:
    """Find the image files among ``paths``. Folders are searched recursively.

    Skipped with a reason: files in a folder that neither have the suffix of an image nor begin as DICOM does (a file
    that is given directly is always tried), dangling links, links to folders, unreadable folders, anything that is not
    a regular file, DICOM files without pydicom, and folders with earlier output of fastfg. Hidden files, hidden folders
    and ``__MACOSX`` are left out without a reason. A file that is found twice is read once.

    Raises FileNotFoundError for a path that does not exist.
    """
    found = Found([], [])
    for path in paths:
        if path.is_dir():
            inside = _search(path)
            found.paths.extend(sorted(inside.paths))
            found.skipped.extend(sorted(inside.skipped))
        elif not os.path.lexists(path):
            raise FileNotFoundError(f"images: expected a file or folder, got {path}, which does not exist")
        elif reason := _why_no_file(path):
            found.skipped.append(FileError(path, reason))
        else:
            found.paths.append(path)
    once: dict[str, Path] = {}
    for path in found.paths:
        once.setdefault(path_text(path), path)
    return Found(list(once.values()), found.skipped)


def batches(
    paths: Sequence[Path],
    transform: Transform,
    batch_size: int,
    *,
    window: Window | None = None,
    max_pixels: int = MAX_PIXELS,
    max_aspect: float = MAX_ASPECT,
    masks: Mapping[Path, Path] | None = None,
    label: int | Sequence[int] | None = None,
    keep_without_mask: bool = False,
    readers: int = 1,
) -> Iterator[Batch]:
    """Read the images of ``paths`` in batches. Files that cannot be read are in the ``errors`` of the next batch.

    Args:
        paths: files, read by :func:`read_image`. transform: a PIL image -> [C, H, W], the same shape for all; one that
            draws random numbers needs ``readers=1`` to draw them in order.
        batch_size: images per batch. All batches but the last are full. The last one has no images if only errors
            remained.
        window, max_pixels, max_aspect: see :func:`read_image`.
        masks: {image file: file of its mask}, read by :func:`read_mask` with ``label``. An image without a mask that
            can be read is among the errors.
        keep_without_mask: keep such an image, with an empty mask and the reason in ``mask_errors``.
        readers: threads that read and transform images, see :func:`fastfg.data.threads.n_readers`. They go on with the
            next batch while the caller works on this one. The batches are the same for any number. 1: the caller reads.

    Raises ValueError for arguments that are out of range.
    """
    check_limits(window, max_pixels, max_aspect)
    if readers < 1:
        raise ValueError(f"readers: expected at least 1, got {readers}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    limits: dict[str, Any] = {"max_pixels": max_pixels, "max_aspect": max_aspect}

    def read(path: Path) -> _Read | FileError:
        try:
            picture = read_image(path, window=window, **limits)
            image, mask = transform(picture.image), None
            if masks is not None:
                empty = torch.zeros(image.shape[-2:]) if keep_without_mask else None
                mask = _mask_of(path, masks, transform, picture.image.size, {"label": label, **limits}, empty)
            return _Read(image, picture.window, mask)
        except Exception as error:  # for damaged files, decoders can raise anything; the error is reported
            return FileError(path, f"{type(error).__name__}: {error}")

    batch = Batch([], torch.empty(0), [], [])
    images: list[Tensor] = []
    read_masks: list[tuple[Tensor, str | None]] = []
    for path, found in zip(paths, in_threads(read, paths, readers, batch_size + readers), strict=True):
        if isinstance(found, FileError):
            batch.errors.append(found)
            continue
        batch.paths.append(path)
        batch.windows.append(found.window)
        images.append(found.image)
        if found.mask is not None:
            read_masks.append(found.mask)
        if len(images) == batch_size:
            yield _stacked(batch, images, read_masks)
            batch, images, read_masks = Batch([], torch.empty(0), [], []), [], []
    if images or batch.errors:
        yield _stacked(batch, images, read_masks)


class _Read(NamedTuple):
    """An image [C, H, W], its window, and its mask [H, W] with the reason why that is empty, or None."""

    image: Tensor
    window: Window | None
    mask: tuple[Tensor, str | None] | None


def _stacked(batch: Batch, images: Sequence[Tensor], masks: Sequence[tuple[Tensor, str | None]]) -> Batch:
    """``batch`` with its images, if there are any, and their masks."""
    if images:
        batch = batch._replace(images=torch.stack(list(images)))
    if not masks:
        return batch
    return batch._replace(masks=torch.stack([mask for mask, _ in masks]), mask_errors=[why for _, why in masks])


def _mask_of(
    path: Path,
    masks: Mapping[Path, Path],
    transform: Transform,
    size: tuple[int, int],
    options: Mapping[str, Any],
    empty: Tensor | None,
) -> tuple[Tensor, str | None]:
    """The mask [H, W] of an image. If it can't be read and there is an ``empty`` one, that one and the reason."""
    try:
        if path not in masks:
            raise ValueError("masks: expected a file for this image, got none")
        return read_mask(masks[path], transform, size, **options), None
    except Exception as error:  # as for images
        if empty is None:
            raise
        return empty, f"{type(error).__name__}: {error}"


def path_text(path: Path) -> str:
    """The name of a file in every table. It does not depend on the folder from which the file is found.

    It is the absolute path, with links in its folders resolved. Bytes that are not UTF-8 are shown as ``\\xNN``.
    """
    return os.fsencode(path.parent.resolve() / path.name).decode("utf-8", "backslashreplace")


def _search(root: Path) -> Found:
    """The images below ``root``, and what was skipped there."""
    found, suffixes = Found([], []), readable_suffixes()

    def unreadable(error: OSError) -> None:
        found.skipped.append(FileError(Path(error.filename), f"unreadable folder: {error.strerror}"))

    for name, subfolders, files in os.walk(root, onerror=unreadable):
        folder = Path(name)
        if is_output(folder):
            found.skipped.append(FileError(folder, f"earlier output of fastfg (the folder holds {MARKER})"))
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        links = [folder / name for name in subfolders if (folder / name).is_symlink()]
        found.skipped.extend(FileError(path, "a link to a folder, which is not followed") for path in links)
        for path in (folder / name for name in files if not _hidden(name)):
            if reason := _why_no_file(path) or _why_no_image(path, suffixes):
                found.skipped.append(FileError(path, reason))
            else:
                found.paths.append(path)
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _why_no_file(path: Path) -> str:
    """Why ``path`` is not a regular file; empty if it is one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a dangling link"
    except OSError as error:
        return f"unreadable file: {error.strerror}"
    return "" if stat.S_ISREG(mode) else "not a regular file"


def _why_no_image(path: Path, suffixes: set[str]) -> str:
    """Why a file in a folder is not tried; empty if it is tried."""
    try:
        if path.suffix.lower() in suffixes:
            return ""
        if is_dicom(path):
            return why_no_dicom()
    except OSError as error:
        return f"unreadable file: {error.strerror}"
    return f"the suffix {path.suffix!r} is not that of an image (give the file by itself to have it tried)"
