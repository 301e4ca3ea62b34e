"""Maps that know nothing of the model: random values, a centred Gaussian, and the image's own edges.

They are what a method has to beat: a metric on which a centred blob does as well as an explanation says little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.attribution.methods import over_patches
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.seeds import generator

WIDTH = 0.25  # the standard deviation of the centred Gaussian, as a share of the grid's sides
LUMA = (0.299, 0.587, 0.114)  # the luminance of R, G, B (ITU-R BT.601)
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def random_maps(keys: Sequence[str], grid: PatchGrid, seed: int, name: str) -> Tensor:
    """Uniform values in [0, 1) per patch: float64 [B, gh, gw], on the CPU.

    They depend on ``seed``, the image's key and ``name``, the name of the method, and on nothing else.
    """
    maps = torch.empty(len(keys), grid.gh, grid.gw, dtype=torch.float64, device="cpu")
    for one, key in zip(maps, keys, strict=True):
        one.uniform_(generator=generator(seed, key, f"method {name}"))
    return maps


def centre_map(grid: PatchGrid, width: float = WIDTH) -> Tensor:
    """A Gaussian in the middle of the grid, 1 at its peak: float64 [gh, gw], on the CPU.

    Its standard deviation is ``width`` times the grid's height and width. ``0.25`` is half the way from the centre to
    the edge.
    """
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < math.inf:
        raise ValueError(f"centre.width: expected a number > 0, got {width!r}")
    rows, columns = (
        (torch.arange(n, dtype=torch.float64, device="cpu") - (n - 1) / 2) / (n * width) for n in (grid.gh, grid.gw)
    )
    return torch.exp(-0.5 * (rows[:, None] ** 2 + columns**2))


def edge_maps(images: Tensor, grid: PatchGrid, pixel_std: Sequence[float] | None = None) -> Tensor:
    """The local contrast: the mean over each patch of the luminance's gradient: float64 [B, gh, gw].

    The gradient is the magnitude of the Sobel filter's response, with replicated borders. The luminance of three
    channels has the weights 0.299, 0.587 and 0.114; of another number, it is their mean.

    Args:
        images: [B, C, H, W]. pixel_std: the standard deviations that the channels were divided by, if known. They are
            undone, so that the contrast is that of the picture.
    """
    x, C = images.detach().double(), images.shape[1]
    weights = x.new_tensor(LUMA if C == 3 else [1 / C] * C)
    if pixel_std is not None:
        weights = weights * x.new_tensor(pixel_std)
    luminance = torch.einsum("bchw,c->bhw", x, weights).unsqueeze(1)
    sobel = x.new_tensor(SOBEL)
    filters = torch.stack([sobel, sobel.mT]).unsqueeze(1)
    gradient = F.conv2d(F.pad(luminance, (1, 1, 1, 1), mode="replicate"), filters)
    return over_patches(gradient.norm(dim=1), grid) / (grid.ph * grid.pw)
