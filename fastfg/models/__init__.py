"""Model families: where the blocks, the prefix tokens and the pooling are. One file a family.

``adapt`` finds the family of a model by the names of its classes, so that no model library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastfg.models import timm
from fastfg.models.adapter import Adapter

FAMILIES: dict[str, Callable[[Any], Adapter]] = {"timm.models.vision_transformer.VisionTransformer": timm.adapt}

__all__ = ["FAMILIES", "Adapter", "adapt", "find_adapter"]


def find_adapter(model: Any) -> Adapter | None:
    """The adapter of ``model``, or None where its family is not known."""
    if isinstance(model, Adapter):
        return model
    for cls in type(model).__mro__:
        family = FAMILIES.get(f"{cls.__module__}.{cls.__qualname__}")
        if family is not None:
            return family(model)
    return None


def adapt(model: nn.Module | Adapter) -> Adapter:
    """The adapter of ``model``. Raises TypeError that names the families known, ValueError for odd variants."""
    adapter = find_adapter(model)
    if adapter is None:
        known = ", ".join(sorted(FAMILIES))
        raise TypeError(
            f"model: expected one of {known}, or a fastfg.models.Adapter, got {type(model).__module__}."
            f"{type(model).__qualname__}"
        )
    return adapter
