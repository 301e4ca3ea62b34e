"""Hooks that belong to one reader of a model. Other threads and nested readers may run the same model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_local = threading.local()  # .readers: the active readers of this thread, innermost last


@contextmanager
def reading() -> Iterator[None]:
    """Context that makes the caller this thread's reader. Meanwhile the hooks of outer readers do nothing."""
    outer = getattr(_local, "readers", [])
    _local.readers = [*outer, object()]
    try:
        yield
    finally:
        _local.readers = outer


def reader() -> tuple[int, object]:
    """The current reader: this thread, and its innermost :func:`reading` (None outside of any)."""
    return threading.get_ident(), (getattr(_local, "readers", None) or [None])[-1]


class Stop(Exception):  # noqa: N818  not an error
    """Ends a forward pass after the last block that is needed. A hook raises it, and the reader catches it."""


class OfOneReader:
    """``hook`` for the current reader only. For any other reader it does nothing and returns None."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.owner = hook, reader()

    def __call__(self, *given: Any) -> Any:
        return self.hook(*given) if reader() == self.owner else None


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` for the current reader only. For any other reader it does nothing and returns None."""
    return OfOneReader(hook)


def is_ours(hook: Any) -> bool:
    """Whether ``hook`` was made by :func:`in_this_thread`."""
    return isinstance(hook, OfOneReader)
