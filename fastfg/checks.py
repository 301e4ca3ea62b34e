"""Argument checks for ``attribute`` and ``evaluate``. Messages name the argument, the expected and the given value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastfg.models.adapter import Adapter
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import Target, logits_of
from fastfg.types import Gate


def check_images(images: Any, in_chans: int | None, parameter: Tensor | None) -> None:
    """Require a finite floating tensor [B, in_chans, H, W] with the dtype and device of ``parameter``."""
    channels = "C" if in_chans is None else in_chans
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor [B, {channels}, H, W], got {type(images).__name__}")
    if images.ndim != 4 or in_chans not in (None, images.shape[1]):
        raise ValueError(f"images: expected [B, {channels}, H, W], got {list(images.shape)}")
    dtype = None if parameter is None else parameter.dtype
    if not images.is_floating_point() or dtype not in (None, images.dtype):
        raise TypeError(f"images: expected {dtype or 'a floating dtype'}, as the model has, got {images.dtype}")
    if parameter is not None and images.device != parameter.device:
        raise ValueError(f"images: expected them on {parameter.device}, as the model is, got {images.device}")
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"images: expected finite pixels, got NaN or infinity in image(s) {bad[:8]}")


def check_seed(seed: Any) -> None:
    """Require an integer: 1.0 would draw other numbers than 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed: expected an int, got {seed!r}")


def check_target(adapter: Adapter | None, target: Target) -> Target:
    """``target``, which finds the logits in the model's output. A model without classes needs a target without."""
    if adapter is None:
        return target.bound(logits_of)
    if not adapter.has_logits and target.needs_logits and target.output is None:
        raise ValueError(
            f"target: expected fastfg.Target.similarity or a function of the model's output, as "
            f"{type(adapter.model).__name__} returns an embedding and no class logits, got {target!r} (or give the "
            "model a class head, or wrap it in fastfg.models.ZeroShot)"
        )
    return target.bound(adapter.logits)


def check_layers(name: str, layers: Sequence[int], n_blocks: int) -> None:
    """Require 0-based blocks of the model; ``name`` is the argument that contains them."""
    missing = [layer for layer in layers if not 0 <= layer < n_blocks]
    if missing:
        raise ValueError(f"{name}: expected blocks from 0 to {n_blocks - 1}, as the model has, got {missing}")


def check_gates(gates: Sequence[Gate | None], adapter: Adapter) -> None:
    """Require gates or None, and a model that has the gated blocks."""
    for gate in gates:
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate: expected a fastfg.Gate, None or a list of them, got {type(gate).__name__}")
        if gate is not None:
            check_layers("gate.layers", gate.layers, len(adapter.blocks))


def check_saes(
    saes: Mapping[int, SparseAutoencoder] | None, layers: Sequence[int], device: torch.device, name: str = "saes"
) -> None:
    """Require an SAE of each block of ``layers``, on the model's device. ``name``: of the argument."""
    if saes is not None and not isinstance(saes, Mapping):
        raise TypeError(f"{name}: expected {{block: SparseAutoencoder}} or None, got {type(saes).__name__}")
    saes = saes or {}
    missing = [layer for layer in layers if layer not in saes]
    if missing:
        raise ValueError(f"{name}: expected an SAE for each gated block {list(layers)}, got none for {missing}")
    for layer in layers:
        if not isinstance(saes[layer], SparseAutoencoder):
            raise TypeError(
                f"{name}[{layer}]: expected a SparseAutoencoder, got {type(saes[layer]).__name__} "
                "(fastfg.load_saes reads files)"
            )
        said = saes[layer].provenance.get("layer")
        if said not in (None, layer):
            raise ValueError(
                f"{name}[{layer}]: expected an SAE of this block, got one of block {said} (provenance['layer'])"
            )
        if saes[layer].W_enc.device != device:
            raise ValueError(
                f"{name}[{layer}]: expected it on {device}, as the model is, got {saes[layer].W_enc.device} "
                f"(sae.to({str(device)!r}))"
            )


def check_widths(saes: Any, gates: Sequence[Gate | None], features: int, x: Tensor, block: int) -> None:
    """Require the width of the residual stream ``x`` of the SAEs that gates of ``block`` read.

    ``saes``, ``features``: as in :func:`fastfg.attribute`, already checked.
    """
    for i, gate in enumerate(gates):
        if gate is not None and block in gate.layers and (gate.needs_sae or features):
            if isinstance(saes, (list, tuple)):
                check_width(saes[i][block], x, block, f"saes[{i}]")
            else:
                check_width(saes[block], x, block)


def check_width(sae: SparseAutoencoder, x: Tensor, block: int, name: str = "saes") -> None:
    """Require that the SAE of ``block`` has the width of the model's residual stream. ``name``: of its mapping."""
    if sae.d != x.shape[-1]:
        raise ValueError(f"{name}[{block}]: expected width {x.shape[-1]}, as the model's residual stream, got {sae.d}")
