"""Which backend may serve an op, and why not.

``auto`` picks by the tensors' device. A backend that is named runs, or raises with the reason; nothing falls
back to another one after a kernel has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BACKENDS = ("reference", "cpp", "triton", "cuda")
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this op; the message says why."""


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Make ``implementation`` the one that serves ``op`` on ``backend``."""
    IMPLEMENTATIONS.setdefault(op, {})[backend] = implementation


def why_not(op: str, backend: str) -> str | None:
    """None where ``backend`` can serve ``op``, else the reason."""
    if backend in IMPLEMENTATIONS[op]:
        return None
    return f"there is no {backend} version"


def implementation(op: str, backend: str = "auto") -> Callable[..., Any]:
    """The function that serves ``op``. Raises ValueError for an unknown name, BackendError with a reason."""
    if backend == "auto":
        backend = "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    reason = why_not(op, backend)
    if reason is not None:
        raise BackendError(f"backend: {backend!r} can't run {op}: {reason}")
    return IMPLEMENTATIONS[op][backend]
