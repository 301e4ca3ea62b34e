"""Noisy linear imputation (Rong et al. 2022): a removed pixel becomes the weighted mean of its neighbours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfg.perturb.masks import PatchGrid

NOISE = 0.01  # the published standard deviation
NEIGHBOURS = (((0, 1), 1 / 6), ((1, 0), 1 / 6), ((1, 1), 1 / 12), ((1, -1), 1 / 12))  # one of each opposite pair
LEAF = 8  # pixels: nested dissection stops at blocks of this size


def impute(image: Tensor, masks: Tensor, grid: PatchGrid, random: torch.Generator, noise: float = NOISE) -> Tensor:
    """The image under each of ``masks``, its removed pixels filled by noisy linear imputation.

    Each removed pixel equals the weighted mean of its 8 neighbours, removed or not: 1/6 for each direct neighbour and
    1/12 for each diagonal one. At the image's border the weights of the neighbours inside the image are scaled to a sum
    of 1. That is one sparse linear system per mask, solved in float64 with all channels as right-hand sides. Then
    Gaussian noise is added to the removed pixels. Where every pixel is removed, no neighbour is known: each channel is
    filled with its mean, plus the noise.

    Args:
        image: [C, H, W]. masks: [m, P] bool, True: removed.
        random: a CPU generator. Its state is read and left as it is: each call draws the same noise [C, H, W], and the
            noise of a pixel depends on no mask.
        noise: standard deviation of the noise, in the units of ``image``. The published 0.01 is the default.

    Returns images [m, C, H, W], with the dtype and on the device of ``image``. Needs SciPy.

    Source: Rong, Leemann, Borisov, Kasneci and Kasneci, "A Consistent and Efficient Evaluation Strategy for
    Attribution Methods", ICML 2022, section 5.2 and the authors' code.

    >>> import torch
    >>> from fastfg.perturb import PatchGrid
    >>> from fastfg.perturb.imputation import impute
    >>> row = torch.tensor([[[0.0, 1.0, 3.0]]])  # [1, 1, 3]; the pixel in the middle is removed
    >>> mask = torch.tensor([[False, True, False]])
    >>> impute(row, mask, PatchGrid(1, 3, 1, 1), torch.Generator(), noise=0.0)
    tensor([[[[0.0000, 1.5000, 3.0000]]]])
    """
    _check_scipy()
    C, H, W = image.shape
    pixels = grid.to_pixels(masks).cpu()  # [m, H, W]
    values = image.detach().double().cpu().reshape(C, H * W).numpy().T
    own = torch.Generator(device="cpu")
    own.set_state(random.get_state())
    drawn = noise * torch.randn(image.shape, generator=own, dtype=torch.float64, device="cpu")
    with ThreadPoolExecutor(max(1, min(len(masks), torch.get_num_threads()))) as pool:  # SuperLU lets go of the GIL
        solved = list(pool.map(lambda removed: _solve(values, removed, H, W), pixels.flatten(1).numpy()))
    filled = torch.empty(len(masks), C, H, W, dtype=torch.float64, device="cpu")
    for row, found in enumerate(solved):
        filled[row] = torch.from_numpy(found.T).reshape(C, H, W)
    filled = (filled + drawn).to(image)
    return torch.where(pixels.unsqueeze(1).to(image.device), filled, image)


def _check_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "baseline: 'imputed' needs SciPy; install fastfg with its report extra: pip install 'fastfg[report]'"
        ) from None


def _solve(values: np.ndarray, removed: np.ndarray, H: int, W: int) -> np.ndarray:
    """``values`` [H * W, C] with the ``removed`` pixels [H * W] replaced by the weighted means of their neighbours."""
    from scipy.sparse.linalg import splu

    filled = values.copy()
    if removed.all():
        filled[:] = values.mean(0)
        return filled
    matrix, order = _system(H, W)
    unknown, known = order[removed[order]], np.flatnonzero(~removed)
    if len(unknown):
        rows = matrix[unknown]
        left = rows[:, unknown].tocsc()  # symmetric and positive definite: every unknown pixel is joined to a known one
        factors = splu(left, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        filled[unknown] = factors.solve(-(rows[:, known] @ values[known]))
    return filled


@lru_cache(maxsize=8)
def _system(H: int, W: int) -> tuple[Any, np.ndarray]:
    """The equations of all pixels as a sparse matrix [H * W, H * W], and an order of elimination with little fill-in.

    Row ``i`` is ``(sum of the weights of i's neighbours) x_i - sum of weight * neighbour = 0``.
    """
    from scipy import sparse

    index = np.arange(H * W).reshape(H, W)
    weights: Any = sparse.csr_array((H * W, H * W))
    for (down, right), weight in NEIGHBOURS:
        here = index[: H - down, max(0, -right) : W - max(0, right)].ravel()
        there = index[down:, max(0, right) : W + min(0, right)].ravel()
        weights += sparse.csr_array((np.full(len(here), weight), (here, there)), shape=weights.shape)
    weights = weights + weights.T
    matrix: Any = (sparse.diags_array(weights.sum(1)) - weights).tocsr()
    parts: list[np.ndarray] = []
    _dissect(index, parts)
    return matrix, np.concatenate(parts)


def _dissect(index: np.ndarray, parts: list[np.ndarray]) -> None:
    """Nested dissection: both halves of a block of pixels first, then the line that separates them."""
    h, w = index.shape
    if max(h, w) <= LEAF or not index.size:
        parts.append(index.ravel())
        return
    block = index if h >= w else index.T
    middle = len(block) // 2
    _dissect(block[:middle], parts)
    _dissect(block[middle + 1 :], parts)
    parts.append(block[middle].ravel())
