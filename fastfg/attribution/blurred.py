"""The vanilla map, smoothed as much as a gate changes it: does the gate do more than a blur?"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

HALVINGS = 60

log = logging.getLogger("fastfg")


def blurred(vanilla: Tensor, gated: Tensor) -> Tensor:
    """``vanilla`` under a Gaussian whose width makes it correlate with itself as much as ``gated`` does.

    The standard deviation ``sigma``, in patches and per image, solves ``corr(blur(vanilla, sigma), vanilla) =
    corr(gated, vanilla)`` with Pearson's correlation over the patches, which no scale or shift of a map changes. It
    is at most the longer side of the grid: where even this blur changes the map less than the gate does, the map
    under it is returned, and a warning is logged.

    Args:
        vanilla, gated: [B, gh, gw], floating.

    Returns [B, gh, gw] in the dtype of ``vanilla``. A constant ``vanilla`` stays as it is. The map is NaN where
    ``gated`` is constant or a map is not finite.

    >>> import torch
    >>> vanilla = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]])
    >>> gated = torch.tensor([[[0.0, 1.0, 1.0, 0.0, 0.0]]])
    >>> blurred(vanilla, gated).mul(100).round().tolist()
    [[[21.0, 23.0, 24.0, 23.0, 21.0]]]
    """
    v, wanted = vanilla.double(), correlation(gated.double(), vanilla.double())
    low = torch.zeros_like(wanted)
    high = torch.full_like(wanted, float(max(vanilla.shape[-2:])))
    short = correlation(blur(v, high), v) > wanted
    if bool(short.any()):
        log.warning("blurred: a gate changes %d of %d maps more than the widest blur does", int(short.sum()), len(v))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        far = correlation(blur(v, middle), v) <= wanted
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    constant = (v.amax((-2, -1)) == v.amin((-2, -1)))[:, None, None]
    found = torch.where(wanted.isnan()[:, None, None], torch.nan, blur(v, high))
    return torch.where(constant, v, found).to(vanilla.dtype)


def blur(maps: Tensor, sigma: Tensor) -> Tensor:
    """``maps`` [B, gh, gw] under a Gaussian of standard deviation ``sigma`` [B] patches; 0 leaves a map as it is.

    The weights beyond the grid are left out, and the others sum to 1.
    """
    rows, columns = (_weights(n, sigma) for n in maps.shape[-2:])
    return rows @ maps @ columns.mT


def _weights(n: int, sigma: Tensor) -> Tensor:
    """The weights [B, n, n] of each of ``n`` places for each."""
    place = torch.arange(n, dtype=sigma.dtype, device=sigma.device)
    squares = (place[:, None] - place) ** 2
    weights = torch.exp(-0.5 * squares / sigma.clamp(min=1e-6)[:, None, None] ** 2)
    return weights / weights.sum(-1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the patches of ``a`` and ``b`` [B, gh, gw]: [B]. NaN where one of them is constant."""
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
