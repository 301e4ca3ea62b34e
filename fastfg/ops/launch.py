"""The Triton ops, each a torch op on its tensors' own device; ``native`` is their C++ sibling.

Triton itself is first imported when an op is first launched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fastfg.ops.schema import FAKES, as_reference, schema

LIBRARY = torch.library.Library("fastfg_triton", "DEF")


@functools.cache
def why_not(op: str) -> str | None:
    """None where ``torch.ops.fastfg_triton`` has ``op``, whatever the device, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"fastfg.kernels.{op}") is None:
        return "there is no Triton version"
    LIBRARY.define(schema(op))
    LIBRARY.impl(op, functools.partial(launch, op), "CUDA")
    torch.library.register_fake(f"fastfg_triton::{op}", FAKES[op])
    return None


def launch(op: str, first: Tensor, *rest: Any) -> Any:
    """Triton launches on the current device, which need not be the tensors' own."""
    function = getattr(importlib.import_module(f"fastfg.kernels.{op}"), op)
    with torch.cuda.device(first.device):
        return function(*as_reference(op, first, *rest))
