"""The Triton ops: ``torch.ops.fastfg_triton``.

Triton itself is imported when an op is first launched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastfg_triton", "DEF")
LEAST = (8, 0)  # compute capability; older devices have too little shared memory for the tiles


def register(op: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define the Triton op, whether or not it can run on this machine."""
    LIBRARY.define(schema)
    LIBRARY.impl(op, functools.partial(launch, op), "CUDA")
    torch.library.register_fake(f"fastfg_triton::{op}", fake)


def launch(op: str, first: Tensor, *rest: Any) -> Any:
    """Run ``fastfg/kernels/<op>.py`` on the tensors' device. Triton launches on the current device, so it is set."""
    function = getattr(importlib.import_module(f"fastfg.kernels.{op}"), op)
    with torch.cuda.device(first.device):
        return function(first, *rest)


@functools.cache
def why_not(op: str) -> str | None:
    """The reason why no device can run the Triton version of ``op``, or None."""
    if torch.version.hip is not None:
        return "ROCm is not supported: the kernels hold NVIDIA instructions"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("fastfg.kernels") is None or importlib.util.find_spec(f"fastfg.kernels.{op}") is None:
        return "there is no Triton version"
    return None


def why_not_on(device: torch.device | None) -> str | None:
    """The reason why ``device`` can't run Triton kernels, or None. ``device=None`` asks about all on this machine."""
    if not torch.cuda.is_available():
        return "there is no CUDA device" if device is None else None  # else a fake tensor, for tracing
    every = (torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    devices = every if device is None else [device]
    found = {torch.cuda.get_device_name(one): torch.cuda.get_device_capability(one) for one in devices}
    if any(capability >= LEAST for capability in found.values()):
        return None
    least = ".".join(map(str, LEAST))
    names = ", ".join(f"{name} has {major}.{minor}" for name, (major, minor) in found.items())
    return f"it needs a device of compute capability {least} (sm_{LEAST[0]}{LEAST[1]}) or later: {names}"
