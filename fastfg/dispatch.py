"""Which backend may serve an op, and why not.

``auto`` picks by the tensors' device, and says once in the log what it picked. A backend that is named runs, or
raises with the reason; nothing falls back to another one after a kernel has failed.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfg import native, reference

BACKENDS = ("reference", "cpp", "triton", "cuda")
PREFERRED = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}  # by device, best first
OPS = ("encode_project", "encode_topk", "gate", "project", "relevancy")

log = logging.getLogger("fastfg")


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this op; the message says why."""


def why_not(op: str, backend: str, like: Tensor | None = None) -> str | None:
    """None where ``backend`` can serve ``op`` on tensors as ``like`` (None: on some), else the reason."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if like is not None and like.device.type != "cpu":
            return f"it runs on the CPU, and the tensors are on {like.device}"
        return native.why_not()
    if backend == "triton":
        return _why_not_triton(op, like)
    return "there is no CUDA C++ version"


@functools.cache
def _triton_lacks(op: str) -> str | None:
    """What is missing whatever the tensors; looked up once, not in every call."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if importlib.util.find_spec(f"fastfg.kernels.{op}") else "there is no Triton version"


def _why_not_triton(op: str, like: Tensor | None) -> str | None:
    lacking = _triton_lacks(op)
    if lacking is not None:
        return lacking
    if like is None:
        return None if torch.cuda.is_available() else "there is no CUDA device"
    if like.device.type != "cuda":
        return f"it runs on CUDA devices, and the tensors are on {like.device}"
    return "it has no float64 version" if like.dtype == torch.float64 else None


def implementation(op: str, backend: str, like: Tensor) -> Callable[..., Any]:
    """The function that serves ``op`` on tensors as ``like``.

    Raises ValueError for an unknown name, and BackendError with the reason where a named backend can't.
    """
    if backend == "auto":
        candidates = PREFERRED.get(like.device.type, ("reference",))
        backend = next(name for name in candidates if why_not(op, name, like) is None)
        _say_once(op, backend, like.device.type)
    elif backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    elif (reason := why_not(op, backend, like)) is not None:
        raise BackendError(f"backend: {backend!r} can't run {op}: {reason}")
    found = _load(op, backend)
    return functools.partial(_on_device, like.device, found) if backend == "triton" else found


def _on_device(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """Triton launches on the current device, which need not be the tensors' own."""
    with torch.cuda.device(device):
        return function(*arguments)


def _load(op: str, backend: str) -> Callable[..., Any]:
    if backend == "reference":
        return getattr(reference, op)
    if backend == "cpp":
        return getattr(native, op)
    return getattr(importlib.import_module(f"fastfg.kernels.{op}"), op)


@functools.cache
def _say_once(op: str, backend: str, device: str) -> None:
    log.info("%s on %s: %s", op, device, backend)
