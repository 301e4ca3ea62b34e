"""Read the files of an SAE. Every error names the file and what is wrong with it. No pickled code is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.model import DTYPES, check_finite

CONFIG = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's ``config.json``."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8
        raise ValueError(f"path: expected JSON in {file}, got {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"path: expected a JSON object in {file}, got {type(config).__name__}")
    return config


def read_tensors(file: Path, reader: Callable[[Path], Any]) -> dict[str, Any]:
    """The result of ``reader(file)``, which must be a mapping {name: tensor}."""
    try:
        state = reader(file)
    except Exception as error:  # pickle, zip files and safetensors raise nearly anything for a damaged file
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"path: expected tensors in {file}, got a file that is damaged or holds pickled code, which is never run "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"path: expected tensors by name in {file}, got {type(state).__name__}")
    return state


def pick(state: dict[str, Any], names: Iterable[str], file: Path) -> dict[str, Any]:
    """The tensors ``names`` of ``state``. They must exist, be tensors and be finite."""
    picked = {}
    for name in names:
        if name not in state:
            raise ValueError(f"path: expected {name} in {file}, got {sorted(map(str, state))[:12]}")
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"path: expected {name} in {file} to be a tensor, got {type(tensor).__name__}")
        kind = "a quantized" if tensor.is_quantized else "a meta" if tensor.is_meta else str(tensor.layout)
        if kind != str(torch.strided):
            raise ValueError(f"path: expected {name} in {file} to be a dense tensor, got {kind} tensor")
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(f"path: expected {name} in {file} to be one of {DTYPES}, got {tensor.dtype}")
        try:
            check_finite({name: tensor})
        except ValueError:
            raise ValueError(f"path: expected finite weights in {file}, got NaN or infinity in {name}") from None
        picked[name] = tensor
    return picked


def field(config: dict[str, Any], name: str, kind: type, folder: Path) -> Any:
    """The field ``name`` of a config. It must exist and be of type ``kind``; a bool is not an int."""
    if name not in config:
        raise ValueError(f"path: expected the field {name} in {folder / CONFIG}, got {sorted(config)[:12]}")
    value = config[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"path: expected {name} in {folder / CONFIG} to be {_A[kind]}, got {value!r}")
    return value


_A = {int: "an integer", str: "a string", bool: "true or false", dict: "an object"}
