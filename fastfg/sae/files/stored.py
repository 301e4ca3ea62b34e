"""Tensors that are still in their file: shape and dtype are known, and the values are read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

CHUNK = 1 << 24  # bytes read at once


class UnreadableError(ValueError):
    """The file is damaged, asks for code to be run, or would need more memory than its size justifies."""


@dataclass(eq=False, repr=False)
class Stored:
    """A tensor in a file. ``load`` returns its values on the CPU, in the file's dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(eq=False, repr=False)
class Odd:
    """A tensor that fastfg does not read: sparse, quantized or without values."""

    kind: str


class Storage:
    """The bytes under one or several tensors. They are read once, on first use.

    Args:
        n_bytes: its size, which the file has been checked to hold. read: fills a buffer of that size.
        dtype: of its elements; None for bytes without a type.
    """

    def __init__(self, n_bytes: int, dtype: torch.dtype | None, read: Callable[[memoryview], None]) -> None:
        self.n_bytes, self.dtype, self._read = n_bytes, dtype, read
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        """The bytes [n] as uint8."""
        if self._values is None:
            values = torch.empty(self.n_bytes, dtype=torch.uint8)
            if self.n_bytes:
                self._read(memoryview(values.numpy()))  # type: ignore[arg-type]
            self._values = values
        return self._values

    def tensor(self, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> Stored:
        """A view of the storage. Raises UnreadableError for one that does not fit into it."""
        dtype = dtype or self.dtype
        if dtype is None:
            raise UnreadableError("a tensor over a storage without a dtype")
        check_view(self.n_bytes // dtype.itemsize, offset, shape, stride)
        sizes = tuple(shape)

        def load() -> Tensor:
            n = self.n_bytes // dtype.itemsize
            typed = self.values()[: n * dtype.itemsize].view(dtype)
            return typed.as_strided(sizes, tuple(stride), offset)

        return Stored(sizes, dtype, load)


def check_view(n: int, offset: Any, shape: Any, stride: Any) -> None:
    """Require that a strided view lies within ``n`` elements and repeats none of them many times."""
    numbers = [offset, *_sequence(shape), *_sequence(stride)]
    if len(shape) != len(stride) or len(shape) > 8 or not all(type(i) is int and 0 <= i < 2**48 for i in numbers):
        raise UnreadableError("a tensor with an offset, shape or stride that is not possible")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    count = math.prod(shape)
    if count and (last >= n or count > n):
        raise UnreadableError(f"a tensor {short(list(shape))} over a storage of {n} values")


def fill(file: IO[bytes], buffer: memoryview) -> None:
    """Read ``len(buffer)`` bytes. Raises UnreadableError if the file ends earlier."""
    done = 0
    while done < len(buffer):
        n = file.readinto(buffer[done : done + CHUNK])  # type: ignore[attr-defined]
        if not n:
            raise UnreadableError(f"a file that ends {len(buffer) - done} bytes too early")
        done += n


def short(value: Any) -> str:
    """``value`` in a message. Its depth and length are bounded, whatever a file holds."""
    if isinstance(value, (str, int, float, bool, type(None))) and not (isinstance(value, int) and abs(value) > 2**64):
        text = repr(value[:60] if isinstance(value, str) else value)
        return text if not isinstance(value, str) or len(value) <= 60 else text + "..."
    if isinstance(value, (list, tuple)) and len(value) <= 8 and all(type(v) in (int, str, float) for v in value):
        return "[" + ", ".join(map(short, value)) + "]"
    return f"a {type(value).__name__}"


def _sequence(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise UnreadableError("a tensor whose shape is no list")
    return value
