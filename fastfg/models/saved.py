"""A fine-tuned classifier on disk: its weights, and what is needed to use them, in timm's own form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfg.files import whole, write_tensors

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def save_classifier(
    folder: str | Path,
    model: Any,
    architecture: str,
    labels: Sequence[str],
    *,
    model_args: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a timm model as ``weights.safetensors`` and ``config.json``. Returns the file of the weights.

    :func:`fastfg.models.load` reads both, and so does ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Args:
        folder: created if it is missing. architecture: the name of the timm model.
        labels: the names of the classes, in the order of the model's outputs.
        model_args: arguments of ``timm.create_model`` that are not its defaults, such as ``img_size``.
        about: more to keep, under ``fastfg``: how the weights were made.

    Raises ValueError if the model has another number of outputs.
    """
    from timm.data import resolve_model_data_config

    if model.num_classes != len(labels):
        raise ValueError(f"labels: expected {model.num_classes} names, as the model has outputs, got {len(labels)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transform = resolve_model_data_config(model)
    size = model.patch_embed.img_size
    if size is not None:
        transform["input_size"] = (transform["input_size"][0], *size)
    config = {
        "architecture": architecture,
        "num_classes": len(labels),
        "label_names": list(labels),
        "model_args": dict(model_args or {}),
        "pretrained_cfg": {name: transform[name] for name in PREPROCESSING} | {"classifier": "head"},
        "fastfg": {"weights": WEIGHTS, **(about or {})},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole(folder / CONFIG) as unfinished:  # which is there once the weights are
        unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder / WEIGHTS, tensors)
    return folder / WEIGHTS


def saved_config(weights: str | Path) -> dict[str, Any] | None:
    """The ``config.json`` beside weights of :func:`save_classifier`; None for any other file.

    Raises ValueError for one that is damaged.
    """
    weights = Path(weights)
    file = weights.parent / CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # of another program; the weights say themselves whether they fit
    about = config.get("fastfg") if isinstance(config, dict) else None
    if not isinstance(about, dict) or about.get("weights") != weights.name:
        return None
    wrong = [name for name in ("architecture", "label_names", "model_args", "pretrained_cfg") if name not in config]
    if wrong:
        raise ValueError(f"weights: expected {', '.join(wrong)} in {file}, got none")
    return config
