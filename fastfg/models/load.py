"""Load a timm model by name, with its weights and the transform for its images."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.models.saved import saved_config
from fastfg.models.timm import import_timm, preprocessing


def load(
    name: str, weights: str | Path | None = None, *, pretrained: bool | None = None, **options: Any
) -> tuple[Any, Callable[[Any], Tensor]]:
    """timm's model ``name`` in eval mode, and its evaluation transform: a PIL image -> [C, H, W].

    timm is imported by :func:`fastfg.models.import_timm`, which also works if torchvision was built for another torch.
    Nothing is downloaded unless ``pretrained`` is True.

    Args:
        name: the name of a timm ``VisionTransformer`` or ``Eva``, for example ``vit_base_patch16_224``.
        weights: a file with the model's state dict: .safetensors, or .pt and .pth, which are read without running
            pickled code. The number of classes is taken from the ``head`` in it. For weights of ``fastfg finetune``,
            the image size, the transform and the names of the classes (``model.pretrained_cfg["label_names"]``) are
            taken from the ``config.json`` beside them.
        pretrained: True: timm downloads its own weights. False: random weights. Required if ``weights`` is None.
        options: arguments of ``timm.create_model``, for example ``img_size`` and ``num_classes``.

    Raises FileNotFoundError for a missing file, ValueError for weights that do not fit, and TypeError for an unknown
    model family.

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
    config = None if weights is None else saved_config(weights)
    if config is not None:
        if config["architecture"] != name:
            raise ValueError(f"model: expected {config['architecture']}, as {weights} says, got {name}")
        overlay = config["pretrained_cfg"] | {"label_names": config["label_names"]}
        options = config["model_args"] | {"pretrained_cfg_overlay": overlay} | options
    if "head.weight" in state:
        options = {"num_classes": len(state["head.weight"])} | options
    model = create(name, pretrained=bool(pretrained), **options)
    adapt(model)  # refuses other architectures
    if weights is not None:
        load_state(model, state, name)
    return model.eval(), preprocessing(model)


def load_state(model: Any, state: dict[str, Tensor], name: str) -> None:
    """Load ``state`` into ``model``. Raises ValueError if names or shapes differ."""
    if wrong := misfit(model.state_dict(), state):
        raise ValueError(f"weights: expected those of {name}, got a state dict with {wrong}")
    model.load_state_dict(state)


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a .pt or .pth file, which is read without running pickled code.

    The keys ``state_dict`` and ``model`` of training checkpoints are unwrapped. Raises FileNotFoundError if there is
    no file, and ValueError if it does not contain a state dict.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"weights: expected a file, got {file}, which {'is a folder' if file.is_dir() else 'does not exist'}"
        )
    try:
        state: Any = _read(file)
    except Exception as error:  # for damaged files, the readers can raise anything
        raise ValueError(
            f"weights: expected a state dict of tensors (.safetensors, .pt or .pth), got {file}, which cannot be read "
            f"as one: {type(error).__name__}: {_first_sentence(error)}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ValueError(f"weights: expected a state dict {{name: tensor}}, got something else in {file}")
    return state


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def check_name(name: str) -> None:
    """Raise ValueError for a name that timm does not know; one with a ``/`` is that of a hub."""
    timm = import_timm()
    if "/" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(pretrained=False), n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(f"model: expected the name of a timm model, got {name!r}{hint}")


def create(name: str, pretrained: bool, **options: Any) -> Any:
    """Create timm's model. Errors name the argument."""
    check_name(name)
    timm = import_timm()
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # the network, the hub and timm's own checks
        what = "pretrained: timm could not fetch the weights of" if pretrained else "model: timm could not create"
        hint = " (without a network, give the file of the weights)" if pretrained else ""
        raise ValueError(f"{what} {name}: {type(error).__name__}: {_first_sentence(error)}{hint}") from error


def misfit(expected: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """How the names or shapes of two state dicts differ, with the first few names of each kind; empty if they agree."""
    shapes = [name for name in expected if name in got and expected[name].shape != got[name].shape]
    parts = {
        "no": [str(name) for name in expected if name not in got],
        "unexpected": [str(name) for name in got if name not in expected],
        "other shapes for": [
            f"{name} ({list(got[name].shape)} and not {list(expected[name].shape)})" for name in shapes
        ],
    }
    said = "; ".join(
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in parts.items()
        if names
    )
    hint = "; position embeddings depend on the image size" if any("pos" in name for name in shapes) else ""
    return said + hint


def _first_sentence(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0]
