"""Choose how perturbed images reach the model: as tokens if that gives the same logits, else as pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfg.models import Adapter
from fastfg.perturb.batches import Batches, checked_size
from fastfg.perturb.forward_path import ForwardPath, Paths
from fastfg.perturb.masks import PatchGrid, asymmetric_halves
from fastfg.perturb.pixels import ImputedPixels, Pixels
from fastfg.perturb.precision import Precision, grown_rounding
from fastfg.perturb.removal import Removal
from fastfg.perturb.removal_check import check_removal
from fastfg.perturb.tokens import Tokens
from fastfg.perturb.views import Fill, View
from fastfg.targets import Target

PATHS = ("auto", "tokens", "pixels")
TF32_EPS = 2.0**-10

log = logging.getLogger("fastfg")


class Differs(Exception):  # noqa: N818
    """Perturbed tokens and perturbed pixels give different results; the message says how they differ."""


def choose_path(
    adapter: Adapter | None,
    forward: Callable[[Tensor], Any],
    grid: PatchGrid,
    images: Tensor,
    fills: Callable[[int], list[Fill]],
    path: str,
    precision: str,
    target: Target,
) -> tuple[Paths, str]:
    """Return the paths for these images and their name. The name of a slower path includes the reason.

    Args:
        fills: what the removed patches of an image are filled with in this evaluation, by the image's index.
        path: ``auto``, ``tokens`` (raises ValueError if the tokens can't be perturbed) or ``pixels``.
        precision: ``auto`` (bfloat16 for a float32 model of a known family on a CUDA device, else the model's own), or
            a name of :class:`fastfg.perturb.Precision`.
        target: what is read from the model's output.

    ``auto`` and ``tokens`` compare both paths on every image: two perturbed images per fill, each run both ways.
    """
    if path not in PATHS:
        raise ValueError(f"path: expected one of {PATHS}, got {path!r}")
    how = _precision(adapter, images, precision)
    if adapter is not None and how.dtype is not None:
        pixels, imputed = (kind(Tokens(adapter, how).whole, grid) for kind in (Pixels, ImputedPixels))
    else:
        pixels, imputed = (kind(forward, grid, how) for kind in (Pixels, ImputedPixels))
    filled, name = _filled(adapter, Pixels(forward, grid), pixels, images, fills, path, how, target)
    paths = Paths(filled, imputed, eps=max(how.eps(images.dtype), _own_eps(images)))
    kinds = {View(images[0], fill).kind for fill in fills(0)} if len(images) else set()
    if "removed" not in kinds:
        return paths, name
    if adapter is None:
        raise ValueError("baseline: expected a fill for a model of no known family, got 'removed'")
    alone = check_removal(adapter, grid, images, target)
    paths = paths._replace(removed=Removal(adapter, how, target.may_read_patches), reads_prefix_alone=alone)
    return paths, "removed" if kinds == {"removed"} else f"{name}, removed"


def _filled(
    adapter: Adapter | None,
    own: Pixels,
    pixels: Pixels,
    images: Tensor,
    fills: Callable[[int], list[Fill]],
    path: str,
    how: Precision,
    target: Target,
) -> tuple[ForwardPath, str]:
    """The path of filled views and its name. ``own``: ``pixels`` in the model's own dtype."""
    if path == "pixels" or not len(images) or (path == "auto" and adapter is None):
        return pixels, "pixels"
    if adapter is None:
        raise ValueError("path: expected 'pixels' for a model of no known family, got 'tokens'")
    try:
        _compare(adapter, own, images, fills, target)
    except Differs as reason:
        if path == "tokens":
            raise ValueError(f"path: expected 'pixels' for this model, as {reason}") from None
        log.warning("perturbing pixels: %s", reason)
        return pixels, f"pixels ({reason})"
    return Tokens(adapter, how, target.may_read_patches), "tokens"


def _precision(adapter: Adapter | None, images: Tensor, name: str) -> Precision:
    if name == "auto":
        fast = images.device.type == "cuda" and images.dtype == torch.float32 and adapter is not None
        name = "bfloat16" if fast else "float32"
    return Precision(name, images.device)


def _compare(
    adapter: Adapter, pixels: Pixels, images: Tensor, fills: Callable[[int], list[Fill]], target: Target
) -> None:
    """Perturb every image both ways, in the model's own dtype. Raises Differs if the results are not the same.

    The tokens before the first block tell patches that overlap, or are in another order. The logits tell a model that
    reads its input elsewhere too.
    """
    masks = asymmetric_halves(pixels.grid.gh, pixels.grid.gw).to(images.device)
    tokens = Tokens(adapter, all_rows=target.may_read_patches)

    def work(rows: slice) -> None:
        views = [View(images[i], fill) for i in range(rows.start, rows.stop) for fill in fills(i)]
        views = [view for view in views if view.kind == "filled"]
        if views:
            _compare_tokens(pixels, tokens, views, masks)
            _compare_logits(pixels, tokens, views, masks, target)

    try:
        Batches(checked_size(images.device, pixels.grid.n_patches)).run(len(images), work)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Differs(f"its tokens can't be perturbed before the first block ({error})") from error


def _perturbed(path: ForwardPath, views: Sequence[View], masks: Tensor) -> tuple[Tensor, ...]:
    """Each view under each of ``masks`` [m, P]."""
    prepared = path.prepare(torch.stack([view.image for view in views]), [view.fill for view in views])
    of = torch.arange(len(views), device=masks.device).repeat_interleave(len(masks))
    return path.inputs(prepared, of, masks.repeat(len(views), 1))


def _compare_tokens(pixels: Pixels, tokens: Tokens, views: Sequence[View], masks: Tensor) -> None:
    (images,) = _perturbed(pixels, views, masks)
    expected, found = tokens.stream(images).double(), _perturbed(tokens, views, masks)[0].double()
    if found.shape != expected.shape:
        raise Differs(f"perturbed pixels give tokens {list(expected.shape)}, not {list(found.shape)}")
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    eps = _own_eps(images)
    if not float(error.max()) <= (100 if eps < 1e-5 else 8) * eps:
        raise Differs(f"perturbing pixels changes tokens of patches that are not removed, by {float(error.max()):.1e}")


def _own_eps(images: Tensor) -> float:
    """The relative rounding of the model's own precision."""
    if images.is_cuda and images.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return TF32_EPS
    return float(torch.finfo(images.dtype).eps)


def _compare_logits(pixels: Pixels, tokens: Tokens, views: Sequence[View], masks: Tensor, target: Target) -> None:
    """Compare what ``target`` reads: the logits, an embedding, or the values of a function."""
    found, expected = (
        target.source(path.run(_perturbed(path, views, masks)), len(views) * len(masks)).double()
        for path in (tokens, pixels)
    )
    m = len(masks)
    largest = expected.abs().unflatten(0, (-1, m)).amax((1, 2))  # per view: under one mask all logits may be near 0
    error = (found - expected).abs().unflatten(0, (-1, m)).amax((1, 2)) / largest.clamp(min=1e-30)
    if not float(error.max()) <= grown_rounding(views[0].image.dtype):
        raise Differs(
            f"perturbing its tokens gives logits that differ from those of the pixels by {float(error.max()):.1e}"
        )
