"""Judge an SAE on one's own tokens, given as tokens or as images and a model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.attribution.patch_scores import shuffled
from fastfg.attribution.residuals import residuals
from fastfg.models import Adapter
from fastfg.sae.model import SparseAutoencoder
from fastfg.sae.recipe import CONTROLS
from fastfg.sae.report import SAEReport, all_same, explained_variance, report

LEAST = 0.5  # explained variance below which attribute warns
SAMPLE = 64  # tokens of a batch that it looks at

log = logging.getLogger("fastfg")
_seen: weakref.WeakSet[SparseAutoencoder] = weakref.WeakSet()
_on_blank_images: ContextVar[bool] = ContextVar("on_blank_images", default=False)


def sae_report(
    sae: SparseAutoencoder,
    tokens: Tensor | None = None,
    *,
    model: nn.Module | Adapter | None = None,
    images: Tensor | None = None,
    layer: int | None = None,
) -> SAEReport:
    """How well ``sae`` fits your own data: explained variance, L0, dead share and norm ratio.

    Args:
        sae: any :class:`fastfg.SparseAutoencoder`.
        tokens: [T, d] or [B, P, d], residuals at the SAE's block (see :func:`fastfg.residuals`).
        model, images, layer: in place of tokens: the residuals of ``images`` [B, C, H, W] at block ``layer`` of
            ``model``, at the patches. ``layer`` may be left out if the SAE's provenance says it.

    Returns an :class:`fastfg.sae.SAEReport`. The dead share counts features that none of these tokens activates, so it
    falls with more tokens. Raises ValueError or TypeError that names the argument.

    >>> import torch, fastfg
    >>> x = torch.randn(2048, 4) @ torch.randn(4, 16)
    >>> sae, _ = fastfg.train_sae(x, n_features=64, k=8, batch_size=64)
    >>> fastfg.sae_report(sae, x).l0 <= 8
    True
    """
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae: expected a SparseAutoencoder, got {type(sae).__name__}")
    if tokens is None:
        tokens = _tokens(sae, model, images, layer)
    elif model is not None or images is not None or layer is not None:
        raise ValueError("tokens: expected either tokens, or model, images and layer, got both")
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point() or tokens.ndim not in (2, 3):
        got: Any = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens: expected floating [T, {sae.d}] or [B, P, {sae.d}], got {got}")
    if tokens.shape[-1] != sae.d:
        raise ValueError(f"tokens: expected width {sae.d}, as the SAE has, got {tokens.shape[-1]}")
    if not bool(tokens.isfinite().all()):
        raise ValueError("tokens: expected finite numbers, got NaN or infinity")
    return report(sae, tokens.detach().reshape(-1, sae.d))


def _tokens(
    sae: SparseAutoencoder, model: nn.Module | Adapter | None, images: Tensor | None, layer: int | None
) -> Tensor:
    if model is None or images is None:
        raise ValueError("tokens: expected tokens, or model and images, got neither")
    layer = sae.provenance.get("layer") if layer is None else layer
    if layer is None:
        raise ValueError("layer: expected the block that the SAE belongs to, got None")
    return residuals(model, images, layers=layer)[layer]


@contextmanager
def on_blank_images() -> Iterator[None]:
    """Inside, :func:`warn_of_poor_fit` does nothing: blank images say nothing about an SAE."""
    token = _on_blank_images.set(True)
    try:
        yield
    finally:
        _on_blank_images.reset(token)


@torch.no_grad()
def warn_of_poor_fit(sae: SparseAutoencoder, x: Tensor, block: int) -> None:
    """Warn, once per SAE, if it explains less than half of the variance of residuals ``x`` [B, P, d].

    Controls are silent: those of :func:`fastfg.train_sae` are made to explain less.
    """
    recipe = sae.provenance.get("recipe")
    control = isinstance(recipe, Mapping) and recipe.get("kind") in CONTROLS
    if control or sae in _seen or _on_blank_images.get():
        return
    flat = x.detach().reshape(-1, x.shape[-1])
    sample = flat[shuffled(len(flat), 0, flat.device)[:SAMPLE]]  # of all images and places
    if all_same(sample):
        return
    _seen.add(sae)
    found = explained_variance(sae, sample)
    if not found >= LEAST:  # also NaN
        log.warning(
            "saes[%d]: it explains %.2f of the variance of this batch's residuals, less than %.1f: it may belong to "
            "another model, block or preprocessing (fastfg.sae_report says more)", block, found, LEAST,
        )  # fmt: skip
