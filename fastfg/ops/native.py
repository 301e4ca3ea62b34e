"""The C++ ops, where they were built; ``launch`` is their Triton sibling."""

from __future__ import annotations

import functools
import importlib

import torch

from fastfg.ops.schema import FAKES, schema


@functools.cache
def why_not(op: str) -> str | None:
    """None where ``torch.ops.fastfg`` has ``op``, else the reason."""
    try:
        importlib.import_module("fastfg._C")  # registers torch.ops.fastfg
    except ImportError as error:
        return f"fastfg._C is not built or does not load ({error}); see FASTFG_BUILD in setup.py"
    if not hasattr(torch.ops.fastfg, op):
        return "there is no C++ version"
    built, expected = str(getattr(torch.ops.fastfg, op).default._schema), f"fastfg::{schema(op)}"
    if built != expected:
        return f"fastfg._C was built from other sources and must be built again: it has {built}, not {expected}"
    torch.library.register_fake(f"fastfg::{op}", FAKES[op])
    return None
