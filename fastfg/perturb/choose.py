"""How a model is run under perturbation: by its tokens where that gives the same logits, else by its pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastfg.models import Adapter
from fastfg.perturb.forward_path import ForwardPath
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.pixels import Pixels
from fastfg.perturb.precision import Precision
from fastfg.perturb.tokens import Tokens

PATHS = ("auto", "tokens", "pixels")
BATCH_ON_CPU, BATCH_ON_GPU = 16, 256
PROBE = 8  # images that tell how much memory one takes

log = logging.getLogger("fastfg")
_why_not: WeakKeyDictionary[Any, dict[object, str | None]] = WeakKeyDictionary()


def choose_path(
    adapter: Adapter | None,
    forward: Callable[[Tensor], Tensor],
    grid: PatchGrid,
    images: Tensor,
    path: str,
    precision: str,
) -> tuple[ForwardPath, str]:
    """The path, and its name with the reason where it isn't the fast one.

    Args:
        path: ``auto``, ``tokens`` (raises ValueError where these can't be perturbed) or ``pixels``.
        precision: ``auto`` (bfloat16 for a float32 model of a known family on a CUDA device, else the model's own), or
            a name of :class:`fastfg.perturb.Precision`.
    """
    if path not in PATHS:
        raise ValueError(f"path: expected one of {PATHS}, got {path!r}")
    how = _precision(adapter, images, precision)
    pixels = Pixels(forward, grid, how)
    if path == "pixels" or not len(images) or (path == "auto" and adapter is None):
        return pixels, "pixels"
    if adapter is None:
        raise ValueError("path: expected 'pixels' for a model of no known family, got 'tokens'")
    tokens = Tokens(adapter, how)
    known = _why_not.setdefault(adapter.model, {})
    key = (tuple(images.shape[1:]), images.dtype, images.device.type, how.name)
    if key not in known:
        known[key] = tokens.why_not(_any_image(images), images.new_full((1, 1, 1), 0.1), pixels)
        if known[key] is not None:
            log.warning("perturbing pixels: %s", known[key])
    reason = known[key]
    if reason is None:
        return tokens, "tokens"
    if path == "tokens":
        raise ValueError(f"path: expected 'pixels' for this model, as {reason}")
    return pixels, f"pixels ({reason})"


def _any_image(like: Tensor) -> Tensor:
    """One of noise [1, C, H, W]: what is true of a model does not depend on the user's images."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, *like.shape[1:], generator=random, dtype=torch.float64).to(like)


def _precision(adapter: Adapter | None, images: Tensor, name: str) -> Precision:
    if name == "auto":
        fast = images.device.type == "cuda" and images.dtype == torch.float32 and adapter is not None
        name = "bfloat16" if fast else "float32"
    return Precision(name, images.device)


def fitting_batch(path: ForwardPath, images: Tensor, limit: int | None) -> int:
    """Perturbed images a forward: as many as the device's free memory holds, ``limit`` at most."""
    if images.device.type != "cuda":
        return limit or BATCH_ON_CPU
    limit = limit or BATCH_ON_GPU
    if limit <= PROBE or not len(images):
        return limit
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    try:
        path.whole(images[:1].expand(PROBE, -1, -1, -1))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return PROBE // 2  # and the engine goes on from there
    each = (torch.cuda.max_memory_allocated(images.device) - before) / PROBE
    free = torch.cuda.mem_get_info(images.device)[0] + torch.cuda.memory_reserved(images.device) - before
    return max(1, min(limit, int(0.8 * free / max(each, 1))))  # 0 from an allocator that keeps no statistics
