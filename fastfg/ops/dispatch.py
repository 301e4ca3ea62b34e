"""Which backend may serve an op, and why not.

``auto`` picks by the tensors' device, and says once in the log what it picked. A backend that is named runs, or
raises with every reason; nothing falls back to another one after a kernel has failed.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from fastfg import reference
from fastfg.ops import launch, native
from fastfg.ops.schema import FAKES, call

BACKENDS = ("reference", "cpp", "triton", "cuda")
PREFERRED = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}  # by device, best first
NAMESPACES = {"cpp": "fastfg", "triton": "fastfg_triton"}  # of torch.ops
OPS = tuple(FAKES)

log = logging.getLogger("fastfg")


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this op; the message says why."""


def run(op: str, backend: str, *arguments: Any, like: Tensor | None = None) -> Any:
    """``op`` on the arguments of its reference, by a backend that serves tensors as ``like`` (None: the first)."""
    like = arguments[0] if like is None else like
    chosen = choose(op, backend, like.device.type, like.dtype)
    if chosen == "reference":
        return getattr(reference, op)(*arguments)
    return call(op, getattr(getattr(torch.ops, NAMESPACES[chosen]), op), *arguments)


def choose(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """The name of the backend that serves ``op`` there.

    Raises ValueError for an unknown name, and BackendError with the reasons where a named backend can't.
    """
    return _choose(op, backend, device, dtype)


# A traced program takes the answer as it is, instead of tracing how it was found: what
# torch.compiler.assume_constant_result says, which would load the whole compiler (and triton) here.
choose.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def _choose(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    if backend == "auto":
        candidates = PREFERRED.get(device, ("reference",))
        chosen = next(name for name in candidates if not reasons(op, name, device, dtype))
        log.info("%s on %s (%s): %s", op, device, dtype, chosen)
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    if against := reasons(op, backend, device, dtype):
        raise BackendError(f"backend: {backend!r} can't run {op}: {'; '.join(against)}")
    return backend


def why_not(op: str, backend: str, like: Tensor | None = None) -> str | None:
    """None where ``backend`` can serve ``op`` on tensors as ``like`` (None: on some), else the reasons."""
    found = reasons(op, backend) if like is None else reasons(op, backend, like.device.type, like.dtype)
    return "; ".join(found) or None


def reasons(op: str, backend: str, device: str | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """All that keeps ``backend`` from serving ``op`` on such tensors; None: on any."""
    if backend == "reference":
        return []
    if backend == "cuda":
        return ["there is no CUDA C++ version"]
    sibling, home, name = (native, "cpu", "the CPU") if backend == "cpp" else (launch, "cuda", "CUDA devices")
    found = [sibling.why_not(op)]
    if device not in (None, home):
        found.append(f"it runs on {name}, and the tensors are on {device}")
    if backend == "triton" and device is None and not torch.cuda.is_available():
        found.append("there is no CUDA device")
    if backend == "triton" and dtype == torch.float64:
        found.append("it has no float64 version")
    return [reason for reason in found if reason is not None]
