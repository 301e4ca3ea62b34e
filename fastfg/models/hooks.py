"""Hooks for one reader of a model: other threads, and readers that start inside this one, may run the same model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_local = threading.local()  # .readers: the readers that this thread is in, the innermost last


@contextmanager
def reading() -> Iterator[None]:
    """Make the caller this thread's reader until the block ends; hooks of outer readers do nothing meanwhile."""
    outer = getattr(_local, "readers", [])
    _local.readers = [*outer, object()]
    try:
        yield
    finally:
        _local.readers = outer


def reader() -> tuple[int, object]:
    """Whoever reads models now: this thread, and its innermost :func:`reading` (None outside of any)."""
    return threading.get_ident(), (getattr(_local, "readers", None) or [None])[-1]


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, called only for the reader that is active now; for any other it does nothing and returns None."""
    owner = reader()
    return lambda *given: hook(*given) if reader() == owner else None
