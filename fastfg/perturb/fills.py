"""Fills: the values that replace a removed patch.

A fill is a tensor that broadcasts against the image [C, H, W]: a number, a colour, or a whole filled image. The
baseline ``removed`` has none: tokens leave (``fastfg.perturb.removal``). That of ``imputed`` depends on the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.perturb.masks import PatchGrid

FILLS = ("mean", "channel_mean", "black", "white", "zero", "noise", "blur", "running_mean")
BASELINES = (*FILLS, "imputed", "removed")  # all names of what takes the place of removed patches
Baseline = str | float | Tensor


def is_per_image(baseline: Baseline | None) -> bool:
    """Whether ``baseline`` is a tensor with one entry per image."""
    return isinstance(baseline, Tensor) and baseline.ndim > 0


def is_named(baseline: Baseline | None, name: str) -> bool:
    """Whether ``baseline`` is given by this name; a tensor is not."""
    return isinstance(baseline, str) and baseline == name


def check_baseline_type(baseline: Any) -> None:
    """Require a text, a real number or a tensor of such."""
    number = isinstance(baseline, Real) and not isinstance(baseline, bool)
    if isinstance(baseline, Tensor) and (baseline.dtype == torch.bool or baseline.is_complex()):
        raise TypeError(f"baseline: expected a tensor of real numbers, got {baseline.dtype}")
    if not number and not isinstance(baseline, (str, Tensor)):
        got = repr(baseline) if isinstance(baseline, bool) else type(baseline).__name__
        raise TypeError(f"baseline: expected a name, a number or a tensor, got {got}")


def check_baseline(
    baseline: Baseline, n_images: int, in_chans: int, normalised: bool, names: tuple[str, ...] = FILLS
) -> None:
    """Raise ValueError or TypeError if ``baseline`` is not among ``names`` or does not fit these images."""
    check_baseline_type(baseline)
    if isinstance(baseline, str):
        if baseline not in names:
            raise ValueError(f"baseline: expected one of {names}, a number or a tensor, got {baseline!r}")
        if baseline in ("black", "white") and not normalised:
            raise ValueError(
                f"baseline: {baseline!r} is a colour in pixel space, and the normalisation of this model is not known; "
                "give the normalised values as a tensor [B, C]"
            )
    elif is_per_image(baseline):
        assert isinstance(baseline, Tensor)
        if list(baseline.shape) not in ([n_images], [n_images, in_chans]):
            shapes = f"[{n_images}] or [{n_images}, {in_chans}]"
            raise ValueError(f"baseline: expected a tensor {shapes}, got {list(baseline.shape)}")
        if not bool(baseline.isfinite().all()):
            raise ValueError("baseline: expected finite values, got NaN or infinity")
    elif not math.isfinite(float(baseline)):
        raise ValueError(f"baseline: expected a finite number, got {float(baseline)}")


def make_fill(
    baseline: Baseline,
    image: Tensor,  # [C, H, W]
    index: int,
    grid: PatchGrid,
    random: torch.Generator,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> Tensor:
    """The fill for ``image``. A tensor ``baseline`` has one entry per image; ``index`` selects the entry.

    - ``mean``: the mean over all channels and pixels of the normalised image, one scalar.
    - ``channel_mean``: one mean per channel.
    - ``black``, ``white``: 0 and 1 before normalisation.
    - ``zero``: 0 after normalisation.
    - ``noise``: Gaussian, with the image's own mean and standard deviation per channel.
    - ``blur``: the image under a Gaussian with a standard deviation of one patch.
    - ``running_mean``: the same as ``mean`` for a single step; for a sequence of steps, see :func:`running_mean_fill`.
    """
    if isinstance(baseline, Tensor) and baseline.ndim:
        return baseline[index].to(image).reshape(-1, 1, 1)
    if not isinstance(baseline, str):
        return image.new_full((1, 1, 1), float(baseline))
    if baseline in ("mean", "running_mean"):
        return image.double().mean().to(image.dtype).reshape(1, 1, 1)
    if baseline == "channel_mean":
        return image.double().mean((1, 2)).to(image.dtype).reshape(-1, 1, 1)
    if baseline in ("black", "white"):
        assert pixel_mean is not None and pixel_std is not None  # check_baseline
        mean, std = (
            torch.tensor(v, dtype=torch.float64, device="cpu").reshape(-1, 1, 1) for v in (pixel_mean, pixel_std)
        )
        return ((float(baseline == "white") - mean) / std).to(image)
    if baseline == "zero":
        return image.new_zeros(1, 1, 1)
    if baseline == "noise":
        mean, std = (f(image.double(), dim=(1, 2), keepdim=True) for f in (torch.mean, torch.std))
        noise = torch.randn(image.shape, generator=random, dtype=torch.float64, device="cpu").to(image.device)
        return (mean + std * noise).to(image.dtype)
    if baseline == "blur":
        return blur(image, max(grid.ph, grid.pw))
    raise ValueError(f"baseline: expected one of {FILLS}, got {baseline!r}")


def blur(image: Tensor, sigma: float) -> Tensor:
    """``image`` [C, H, W] under a Gaussian of standard deviation ``sigma`` pixels, cut off at 3 sigma."""
    radius = math.ceil(3 * sigma)
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    blurred = image.double()
    for _ in range(2):  # along the rows, then along the columns
        lines = F.pad(blurred.flatten(0, 1).unsqueeze(1), (radius, radius), mode="replicate")
        blurred = F.conv1d(lines, kernel).reshape(blurred.shape).mT
    return blurred.to(image.dtype)


def running_mean_fill(image: Tensor, order: Tensor, patches_per_step: int, grid: PatchGrid) -> Tensor:
    """The drifting fill: the patches of each step get the mean of the image as it was before that step.

    Args:
        image: [C, H, W]. order: [P] patches in the order of their removal, ``patches_per_step`` at a time.

    Returns a fill [1, H, W]. Filled patches keep their value, so one fill serves all steps.
    """
    sums = grid.sum_pixels(image.double())
    pixels = image.shape[0] * grid.ph * grid.pw
    covered = grid.n_patches * pixels == image.numel()
    total, fill = sums.sum() if covered else image.double().sum(), torch.empty_like(sums)
    for patches in order.split(patches_per_step):
        mean = total / image.numel()
        fill[patches] = mean
        total = total + (mean * pixels * len(patches) - sums[patches].sum())
    return grid.to_pixels(fill).unsqueeze(0).to(image.dtype)
