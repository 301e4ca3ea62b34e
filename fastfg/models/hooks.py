"""Hooks that act in one thread only: another thread may be running the same model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, called only in the thread that made it; in any other thread it does nothing."""
    owner = threading.get_ident()
    return lambda *given: hook(*given) if threading.get_ident() == owner else None
