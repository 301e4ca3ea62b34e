"""Integrated gradients (Sundararajan et al. 2017), summed over patches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg.attribution.capture import named_errors
from fastfg.attribution.gradient_scale import gradient_at
from fastfg.attribution.methods import gradient_x_input
from fastfg.attribution.relevancy_pass import working_dtype
from fastfg.models import Adapter
from fastfg.models.hold import hold
from fastfg.perturb.fills import Baseline, check_baseline, make_fill
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.seeds import generator
from fastfg.targets import Target

STEPS = 50


def integrated_gradients(
    adapter: Adapter,
    images: Tensor,
    target: Target,
    grid: PatchGrid,
    keys: list[str],
    seed: int = 0,
    steps: int = STEPS,
    baseline: Baseline = "zero",
) -> Tensor:
    """The path integral of the gradient from a baseline image to ``images``, times their difference: [B, gh, gw].

    The sum of a map is close to ``f(image) - f(baseline)`` ("completeness"), the closer the more steps there are. The
    integral is taken at ``steps`` Gauss-Legendre points, as in Captum. Each step runs the model forward and backward.

    Args:
        images: [B, C, H, W]. target: resolved for these images.
        keys, seed: what the ``noise`` baseline depends on.
        steps: at least 1.
        baseline: the image where the path starts: ``zero`` (0 in the model's own input, the mean colour for most
            models, and Captum's default), another baseline of :func:`fastfg.evaluate`, or images [B, C, H, W].
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"integrated_gradients.steps: expected an int >= 1, got {steps!r}")
    start = _starts(adapter, images, grid, keys, seed, baseline)
    points, weights = _gauss_legendre(steps)
    name = type(adapter.model).__qualname__
    with hold(adapter.model, adapter.flags), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone()
        total = torch.zeros_like(images, dtype=working_dtype(images))
        for point, weight in zip(points, weights, strict=True):
            x = torch.lerp(start, images, point).requires_grad_()
            with named_errors(name):
                output = adapter.forward(x.clone())  # it may write into its input
                total += weight * gradient_at(x, target, output).to(total.dtype)
    return gradient_x_input(images - start, total, grid)


def _starts(
    adapter: Adapter, images: Tensor, grid: PatchGrid, keys: list[str], seed: int, baseline: Baseline
) -> Tensor:
    """The baseline images [B, C, H, W]."""
    if isinstance(baseline, Tensor) and baseline.ndim == 4:
        if baseline.shape != images.shape or not bool(baseline.isfinite().all()):
            got = "NaN or infinity" if baseline.shape == images.shape else str(list(baseline.shape))
            raise ValueError(f"integrated_gradients.baseline: expected finite images {list(images.shape)}, got {got}")
        return baseline.detach().to(images)
    mean, std = adapter.pixel_mean, adapter.pixel_std
    check_baseline(baseline, len(images), images.shape[1], bool(mean and std))
    fills = [
        make_fill(baseline, image, i, grid, generator(seed, key, "integrated_gradients"), mean, std)
        for i, (image, key) in enumerate(zip(images.detach(), keys, strict=True))
    ]
    return torch.stack([fill.expand_as(image) for fill, image in zip(fills, images, strict=True)])


def _gauss_legendre(steps: int) -> tuple[list[float], list[float]]:
    """Points and weights of the Gauss-Legendre rule on [0, 1]."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(steps)
    return ((points + 1) / 2).tolist(), (weights / 2).tolist()
