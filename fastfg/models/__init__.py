"""Model families, one file per family: where a model's blocks, prefix tokens and pooling are.

``adapt`` finds the family of a model by its class names, so no model library is imported here. ``load`` creates a timm
model with its weights and its transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastfg.models import open_clip, prisma, timm, torchvision, transformers
from fastfg.models.adapter import Adapter
from fastfg.models.load import load
from fastfg.models.open_clip import ZeroShot
from fastfg.models.timm import import_timm
from fastfg.torch_internals import uncompiled

FAMILIES: dict[str, Callable[[Any], Adapter]] = {
    "timm.models.vision_transformer.VisionTransformer": timm.adapt,
    "timm.models.eva.Eva": timm.adapt,
    "torchvision.models.vision_transformer.VisionTransformer": torchvision.adapt,
    "open_clip.transformer.VisionTransformer": open_clip.adapt,
    "vit_prisma.models.base_vit.HookedViT": prisma.adapt,
    **{f"transformers.models.{name}": transformers.adapt for name in transformers.FAMILIES},
}

__all__ = ["FAMILIES", "Adapter", "ZeroShot", "adapt", "find_adapter", "import_timm", "load"]


def find_adapter(model: Any) -> Adapter | None:
    """The adapter of ``model``, or None if its family is not known."""
    if isinstance(model, Adapter):
        return model
    model = uncompiled(model)
    if isinstance(model, ZeroShot):
        return open_clip.adapt_zero_shot(model, adapt(model.trunk))
    family = _family(model)
    return None if family is None else family(model)


def adapt(model: nn.Module | Adapter) -> Adapter:
    """The adapter of ``model``. Raises TypeError for an unknown family, ValueError for an unsupported variant."""
    adapter = find_adapter(model)
    if adapter is None:
        known = ", ".join(sorted(FAMILIES))
        raise TypeError(
            f"model: expected a fastfg.models.Adapter or ZeroShot, or one of {known}, got {type(model).__module__}."
            f"{type(model).__qualname__}{_hint(model)}"
        )
    return adapter


def _hint(model: Any) -> str:
    """Which part of a wrapper is a model of a known family, if there is one."""
    parts = model.named_children() if isinstance(model, nn.Module) else ()
    names = [name for name, part in parts if _family(part) is not None]
    return f" (pass its part `{names[0]}`)" if len(names) == 1 else ""


def _family(model: Any) -> Callable[[Any], Adapter] | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
