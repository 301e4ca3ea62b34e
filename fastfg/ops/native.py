"""Load the C++ ops (``torch.ops.fastfg``), or say why they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fastfg.torch_internals import schema_text


def load() -> str | None:
    """Load the library, which registers the C++ ops. Returns None, or the reason why it can't be loaded."""
    try:
        importlib.import_module("fastfg._C")
    except ImportError as error:
        return f"fastfg._C is not built or does not load ({error}); see FASTFG_BUILD in setup.py"
    return None


UNLOADED = load()
REASONS: dict[str, str | None] = {}  # {op: why it can't be used, or None}


def register(op: str, schema: str, fake: Callable[..., Any]) -> None:
    """Register the fake of the C++ op, if the op exists and has this schema."""
    REASONS[op] = UNLOADED or mismatch(op, schema)
    if REASONS[op] is None:
        torch.library.register_fake(f"fastfg::{op}", fake)


def mismatch(op: str, schema: str) -> str | None:
    """Why the loaded library does not have ``op`` with this schema, or None."""
    if not hasattr(torch.ops.fastfg, op):
        return "there is no C++ version"
    built, expected = schema_text(getattr(torch.ops.fastfg, op)), f"fastfg::{schema}"
    if built != expected:
        return f"fastfg._C was built from other sources and must be built again: it has {built}, not {expected}"
    return None


def why_not(op: str) -> str | None:
    """The reason why ``torch.ops.fastfg`` can't run ``op``, or None."""
    return REASONS[op]
