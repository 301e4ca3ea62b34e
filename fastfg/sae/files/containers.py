"""Open a weights file of any kind, told apart by its first bytes: safetensors, torch, pickle, gzip, NumPy, saev."""

from __future__ import annotations

import gzip
import io
import json
import math
import stat
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastfg.sae.files.stored import CHUNK, Storage, Stored, UnreadableError, fill, short
from fastfg.sae.files.torch_file import limit, open_zip, read_stream, read_zip

MAX_HEADER = 1 << 20  # bytes of saev's JSON line
ZIP, GZIP, PICKLE = b"PK\x03\x04", b"\x1f\x8b", b"\x80"
DAMAGED = "a file that is damaged or holds pickled code, which is never run"


@dataclass
class Weights:
    """What a weights file has. Its tensors are :class:`Stored`: they are read from the file when they are needed.

    Attributes:
        kind: ``safetensors``, ``torch``, ``npz`` or ``saev``.
        content: the object: usually a dict of tensors by name.
        header: the JSON line of a ``saev`` file.
    """

    file: Path
    kind: str
    content: Any
    header: dict[str, Any] | None = None


def is_weights(file: Path) -> bool:
    """Whether the first bytes are those of a weights file. Nothing else is read."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        first = opened.read(9)
        if first[:1] == b"{":
            return _header_line(opened) is not None
    return _is_safetensors(first, file.stat().st_size) or first.startswith((ZIP, GZIP, PICKLE))


def open_weights(file: Path) -> Weights:
    """The content of a weights file. Raises ValueError that names the file and what is wrong with it."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UnreadableError("something that is no file")
        return _open(file)
    except (ValueError, OSError, MemoryError, RecursionError) as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UnreadableError(f"path: expected tensors in {file}, got {DAMAGED}: {reason}") from error


def load(tensor: Stored, file: Path) -> Tensor:
    """The values of a tensor. Raises ValueError that names the file if it turns out to be damaged."""
    try:
        return tensor.load()
    except (ValueError, OSError, MemoryError, RuntimeError, zlib.error) as error:
        raise UnreadableError(f"path: expected tensors in {file}, got {DAMAGED}: {str(error)[:200]}") from error


def _open(file: Path) -> Weights:
    size = file.stat().st_size
    opened = file.open("rb")  # it stays open for the tensors, which are read later
    first = opened.read(9)
    opened.seek(0)
    if _is_safetensors(first, size):
        opened.close()
        return Weights(file, "safetensors", _safetensors(file))
    if first[:1] == b"{":
        header = _header_line(opened)
        if header is None:
            raise UnreadableError("a text file")
        return Weights(file, "saev", _object(opened, size)[1], header)
    kind, content = _object(opened, size)
    return Weights(file, kind, content)


def _object(opened: BinaryIO, size: int, packed: bool = False) -> tuple[str, Any]:
    """The kind and the object of what begins at the file's position."""
    start = opened.tell()
    first = opened.read(4)
    opened.seek(start)
    if first == ZIP:
        archive = open_zip(opened, size)
        if all(name.endswith(".npy") for name in archive.namelist()):
            return "npz", {name[:-4]: _numpy(archive, name) for name in archive.namelist()}
        return "torch", read_zip(archive)
    if first[:2] == GZIP and not packed:
        inner = _unzipped(opened, size)
        return _object(io.BytesIO(inner), len(inner), packed=True)
    if first[:1] == PICKLE:
        return "torch", read_stream(opened, size)
    raise UnreadableError(f"a file of {size} bytes that is no safetensors, torch, pickle or NumPy file")


def _header_line(opened: BinaryIO) -> dict[str, Any] | None:
    """The JSON object in the first line, if anything follows it; the file is then behind that line."""
    opened.seek(0)
    line = opened.readline(MAX_HEADER)
    if not line.endswith(b"\n") or not opened.read(1):
        return None
    opened.seek(len(line))
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _unzipped(opened: BinaryIO, size: int) -> bytes:
    """The unpacked bytes of a gzip file. More than :func:`limit` are never unpacked."""
    parts, left = [], limit(size)
    try:
        with gzip.GzipFile(fileobj=opened) as stream:
            while part := stream.read(CHUNK):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise UnreadableError(
                        f"a gzip file of {size} bytes that would become more than {limit(size)} bytes"
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(f"a damaged gzip file ({error})") from error
    return b"".join(parts)


# safetensors ---------------------------------------------------------------------------------------------------------


def _is_safetensors(first: bytes, size: int) -> bool:
    return first[8:9] == b"{" and 8 + int.from_bytes(first[:8], "little") <= size


def _safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> Tensor:
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except SafetensorError as error:
            raise UnreadableError(str(error)) from error

    try:
        with safe_open(file, framework="pt") as opened:
            stored = {}
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                dtype = getattr(torch, SAFETENSORS.get(part.get_dtype(), ""), None)
                if dtype is None:
                    raise UnreadableError(f"{short(name)} of dtype {part.get_dtype()}")
                stored[name] = Stored(tuple(part.get_shape()), dtype, partial(read, name))
            return stored
    except SafetensorError as error:
        raise UnreadableError(str(error)) from error


SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip

# NumPy ---------------------------------------------------------------------------------------------------------------


def _numpy(archive: zipfile.ZipFile, name: str) -> Stored:
    """An array of an npz file. Its header is checked against the member's size before anything is reserved."""
    import numpy as np
    from numpy.lib import format as npy

    size = archive.getinfo(name).file_size
    try:
        with archive.open(name) as member:
            version = npy.read_magic(member)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = header(member)
            start = member.tell()
    except (ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, NotImplementedError) as error:
        raise UnreadableError(f"a damaged array {short(name)} ({str(error)[:100]})") from error
    if dtype.hasobject or dtype.kind not in "fiu" or dtype.newbyteorder("=") != dtype:
        raise UnreadableError(f"an array {short(name)} of dtype {dtype.str[:20]}")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes != size - start:
        raise UnreadableError(f"an array {short(name)} of {n_bytes} bytes, where the file has {size - start}")
    if dtype.itemsize > 8:
        raise UnreadableError(f"an array {short(name)} of dtype {dtype.str[:20]}")
    torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype

    def read(buffer: memoryview) -> None:
        try:
            with archive.open(name) as member:
                member.read(start)
                fill(member, buffer)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UnreadableError(f"a damaged array {short(name)} ({str(error)[:100]})") from error

    return Storage(n_bytes, torch_dtype, read).tensor(0, tuple(shape), _strides(shape, fortran))


def _strides(shape: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    """Strides of a contiguous array, in elements."""
    order = range(len(shape)) if fortran else reversed(range(len(shape)))
    steps, step = [1] * len(shape), 1
    for axis in order:
        steps[axis] = step
        step *= max(shape[axis], 1)
    return tuple(steps)
