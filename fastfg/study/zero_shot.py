"""CLIP as a zero-shot classifier, from open_clip's files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.models.load import load_state, read_state
from fastfg.models.open_clip import ZeroShot
from fastfg.models.timm import import_timm

PROMPTS_AT_ONCE = 64


def import_open_clip() -> ModuleType:
    """Import ``open_clip``, which imports torchvision as timm does. ModuleNotFoundError names the package."""
    import_timm()
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; install it: pip install open_clip_torch") from None
    return open_clip


def load_zero_shot(
    name: str, weights: str | Path, class_names: Sequence[str], templates: Sequence[str]
) -> tuple[ZeroShot, Callable[[Any], Tensor]]:
    """open_clip's model ``name`` as a classifier with one output per class, in eval mode, and its transform.

    A class's text feature is the mean over the templates of the normalised features of its prompts (Radford et al.
    2021). The text tower is not kept.

    Args:
        name: of an open_clip model, such as ``ViT-B-32``.
        weights: a file with the model's state dict, read without running pickled code. Nothing is downloaded.
        class_names: at least 2. Two that are equal get equal logits, as "missile" among open_clip's names of ImageNet.
        templates: texts in which ``{}`` is replaced by the name of the class.

    Raises ValueError for an unknown model, weights that do not fit, fewer than 2 or empty names, and templates without
    ``{}``.
    """
    open_clip = import_open_clip()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if name not in open_clip.list_models():
        raise ValueError(f"model: expected the name of an open_clip model, got {name!r}")
    check_prompts("class_names", class_names, templates)
    state = read_state(weights)
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights yet
    try:
        model = open_clip.create_model(name, pretrained=None, load_weights=False)
    finally:
        logging.disable(logging.NOTSET)
    load_state(model, state, name)
    model.eval()
    prompts = [[template.replace("{}", label) for template in templates] for label in class_names]
    features = _text_features(model, open_clip.get_tokenizer(name), prompts)
    transform = image_transform_v2(PreprocessCfg(**_preprocessing(model)), is_train=False)
    return ZeroShot(model.visual, features, float(model.logit_scale.detach().exp())).eval(), transform


def check_prompts(argument: str, class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Raise ValueError for fewer than 2 names of classes (the ``argument``), empty ones, and templates without ``{}``.

    >>> check_prompts("class_names", ["dog"], ["a photo of a {}."])
    Traceback (most recent call last):
    ValueError: class_names: expected at least 2 names, none of them empty, got ['dog']
    """
    if isinstance(class_names, str) or len(class_names) < 2 or not all(name.strip() for name in class_names):
        got = class_names if isinstance(class_names, str) else list(class_names)
        raise ValueError(f"{argument}: expected at least 2 names, none of them empty, got {got!r}")
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ValueError(f"templates: expected texts with {{}} for the class, got {wrong or 'none'}")


@torch.no_grad()
def _text_features(model: Any, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """[n, d]: per class the mean of its prompts' normalised features."""
    flat = [text for texts in prompts for text in texts]
    parts = [flat[i : i + PROMPTS_AT_ONCE] for i in range(0, len(flat), PROMPTS_AT_ONCE)]
    features = torch.cat([F.normalize(model.encode_text(tokenizer(part)), dim=-1) for part in parts])
    return features.reshape(len(prompts), len(prompts[0]), -1).mean(1)


def _preprocessing(model: Any) -> dict[str, Any]:
    """The size, mean and standard deviation of the tower's input."""
    tower = model.visual
    return {"size": tower.image_size, "mean": tower.image_mean, "std": tower.image_std}
