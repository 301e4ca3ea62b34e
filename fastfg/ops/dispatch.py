"""Choose the backend that runs an op.

``backend="auto"`` chooses by the tensors' device and logs each choice once. A named backend runs, or raises an
error with every reason why it can't. Nothing falls back to another backend after a kernel has failed.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastfg.ops import launch, native
from fastfg.reference.encode import Activation
from fastfg.torch_internals import constant_when_traced

BACKENDS = ("reference", "cpp", "triton")
PREFERRED = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}  # by device, best first
NAMESPACES = {"cpp": "fastfg", "triton": "fastfg_triton"}  # of torch.ops
OPS: list[str] = []  # the registered ops

log = logging.getLogger("fastfg")
_lock = threading.Lock()

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Fake = TypeVar("Fake", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """The named backend can't run this op. The message says why."""


# Registration with torch --------------------------------------------------------------------------------------------


def register(fake: Fake, mutates: tuple[str, ...] = ()) -> Fake:
    """Register the torch op that ``fake`` describes, for every backend that has it. Runs once, on import.

    The function ``_gate`` describes the op ``gate``. Its signature is the op's schema. Its body returns tensors with
    the shapes and dtypes of the results, for tracing. ``mutates`` names the arguments that the op changes.
    """
    op = fake.__name__.removeprefix("_")
    schema = schema_of(op, fake, mutates)
    native.register(op, schema, fake)
    launch.register(op, schema, fake)
    OPS.append(op)
    return fake


def schema_of(op: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> str:
    """The schema of ``op`` for torch, for example ``gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor``."""
    return op + torch.library.infer_schema(fake, mutates_args=mutates).replace("SymInt", "int")


def torch_op(op: str, backend: str) -> Callable[..., Any]:
    """The torch op of a backend other than the reference."""
    return getattr(getattr(torch.ops, NAMESPACES[backend]), op)


def detached(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator of the public ops: no gradient is recorded, and results are normal tensors even in inference mode.

    Kernels run in threads where ``no_grad`` and inference mode are not active, so they get tensors without a gradient.
    """

    @functools.wraps(op)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False):
            return op(*map(without_gradient, args), **{name: without_gradient(arg) for name, arg in kwargs.items()})

    return run


def without_gradient(value: Any) -> Any:
    """The value itself, or the same tensor without a gradient."""
    if isinstance(value, Activation):
        return value.map(Tensor.detach)
    return value.detach() if isinstance(value, Tensor) else value


# Which backend, and why not -----------------------------------------------------------------------------------------


@constant_when_traced
def choose(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The name of the backend that runs ``op`` for tensors of ``dtype`` on ``device``.

    Raises ValueError for an unknown backend, and BackendError with all reasons if a named backend can't run.
    """
    with _lock:
        return _choose(op, backend, torch.device(device), dtype)


@functools.cache
def _choose(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "auto":
        candidates = PREFERRED.get(device.type, ("reference",))
        chosen = next(name for name in candidates if not reasons(op, name, device, dtype))
        log.info("%s on %s (%s): %s", op, device.type, dtype, chosen)
        return chosen
    _check_known(backend)
    if against := reasons(op, backend, device, dtype):
        raise BackendError(f"backend: {backend!r} can't run {op}: {'; '.join(against)}")
    return backend


def _check_known(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")


def only_reference(op: str, backend: str, what: str) -> None:
    """Require ``auto`` or the reference, for ``what`` the other backends do not have."""
    _check_known(backend)
    if backend not in ("auto", "reference"):
        raise BackendError(f"backend: {backend!r} can't run {op}: only the reference has {what}")


def why_not(op: str, backend: str, like: Tensor | None = None) -> str | None:
    """All reasons why ``backend`` can't run ``op`` for tensors like ``like``; None if it can.

    Without ``like``: why it can't run on any device of this machine. Nothing is registered or loaded.
    """
    found = reasons(op, backend) if like is None else reasons(op, backend, like.device, like.dtype)
    return "; ".join(found) or None


def reasons(op: str, backend: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """All reasons why ``backend`` can't run ``op`` for this device and dtype (None: for any on this machine)."""
    if backend == "reference":
        return []
    if backend == "cpp":
        found = [native.why_not(op), _misplaced(device, "cpu", "the CPU")]
    else:
        found = [launch.why_not(op), _misplaced(device, "cuda", "CUDA devices")]
        if device is None or device.type == "cuda":
            found.append(launch.why_not_on(device))
        if dtype == torch.float64:
            found.append("it has no float64 version")
    return [reason for reason in found if reason is not None]


def _misplaced(device: torch.device | None, home: str, name: str) -> str | None:
    if device is None or device.type == home:
        return None
    return f"it runs on {name}, and the tensors are on {device.type}"
