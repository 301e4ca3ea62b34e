"""A timm model by its name, with its weights and the transform that its images need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.models.timm import import_timm, preprocessing


def load(
    name: str, weights: str | Path | None = None, *, pretrained: bool | None = None, **options: Any
) -> tuple[Any, Callable[[Any], Tensor]]:
    """timm's model ``name`` in eval mode, and its evaluation transform: a PIL image -> [C, H, W].

    It imports timm by :func:`fastfg.models.import_timm`, which also works beside a torchvision that was built for
    another torch. Nothing is fetched over the network unless ``pretrained`` is True.

    Args:
        name: of a timm ``VisionTransformer`` or ``Eva``, for example ``vit_base_patch16_224``.
        weights: file with the model's state dict: .safetensors, or .pt and .pth, which are read without running
            pickled code. The number of classes is that of the ``head`` in it.
        pretrained: True: timm fetches its own weights. False: random weights. Needed where no ``weights`` are given.
        options: of ``timm.create_model``, for example ``img_size`` and ``num_classes``.

    Raises FileNotFoundError for a missing file, ValueError for weights that do not fit, and TypeError for a model of no
    known family.

    >>> import torch, fastfg
    >>> from PIL import Image
    >>> model, transform = fastfg.models.load("vit_tiny_patch16_224", pretrained=False, num_classes=5)
    >>> images = torch.stack([transform(Image.new("RGB", (320, 240)))])
    >>> fastfg.attribute(model, images).maps.shape
    torch.Size([1, 14, 14])
    """
    if (weights is None) == (pretrained is None):
        got = "neither" if weights is None else "both"
        raise ValueError(f"weights: expected a file, or pretrained=True or False, got {got}")
    from fastfg.models import adapt

    state = {} if weights is None else read_state(weights)
    if "head.weight" in state:
        options = {"num_classes": len(state["head.weight"])} | options
    model = import_timm().create_model(name, pretrained=bool(pretrained), **options)
    adapt(model)  # refuses other architectures
    if weights is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"weights: expected those of {name} in {weights}: {error}") from None
    return model.eval(), preprocessing(model)


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a .pt or .pth file, which is read without running pickled code.

    The keys ``state_dict`` and ``model`` of training checkpoints are unwrapped. Raises FileNotFoundError for a missing
    file, and ValueError for one that can't be read or holds no state dict.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"weights: expected a file, got {file}, which does not exist")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own: of pickle, of zip files, of safetensors
        raise ValueError(f"weights: {file} can't be read ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"weights: expected a state dict in {file}, got {type(state).__name__}")
    return state
