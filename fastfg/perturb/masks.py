"""The grid of patches over an image, which turns masks over patches into masks over pixels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """``gh x gw`` patches of ``ph x pw`` pixels; patch ``i`` is at row ``i // gw``, column ``i % gw``.

    ``bottom`` and ``right`` count the pixels beyond the last patch. They belong to no patch: a model whose image size
    is not a multiple of its patch size does not read them.
    """

    gh: int
    gw: int
    ph: int
    pw: int
    bottom: int = 0
    right: int = 0

    @classmethod
    def of(
        cls, image_size: tuple[int, int], grid: tuple[int, int], patch_size: tuple[int, int] | None = None
    ) -> PatchGrid:
        """The patches of an image of (height, width) pixels with ``grid`` = (gh, gw).

        ``patch_size``: (height, width) in pixels. None: the grid divides the image evenly.
        """
        (H, W), (gh, gw) = image_size, grid
        if patch_size is None and (min(gh, gw) < 1 or H % gh or W % gw):
            raise ValueError(f"maps: expected a grid that divides the images' {H} x {W} pixels, got {gh} x {gw}")
        ph, pw = (H // gh, W // gw) if patch_size is None else patch_size
        if gh * ph > H or gw * pw > W:
            raise ValueError(f"maps: expected {gh} x {gw} patches of {ph} x {pw} pixels inside {H} x {W} pixels")
        return cls(gh, gw, ph, pw, H - gh * ph, W - gw * pw)

    @property
    def n_patches(self) -> int:
        return self.gh * self.gw

    def to_pixels(self, per_patch: Tensor) -> Tensor:
        """Values per patch [..., P] to values per pixel [..., H, W]; 0 (False) beyond the last patch."""
        grid = per_patch.unflatten(-1, (self.gh, self.gw))
        pixels = grid.repeat_interleave(self.ph, dim=-2).repeat_interleave(self.pw, dim=-1)
        return F.pad(pixels, (0, self.right, 0, self.bottom)) if self.bottom or self.right else pixels

    def sum_pixels(self, image: Tensor) -> Tensor:
        """Sums over the pixels and channels of each patch: ``image`` [C, H, W] -> [P]."""
        return self.split(image).sum((0, 2, 4)).flatten()

    def split(self, pixels: Tensor) -> Tensor:
        """The pixels of each patch: ``pixels`` [..., H, W] -> [..., gh, ph, gw, pw], without those of no patch."""
        covered = pixels[..., : self.gh * self.ph, : self.gw * self.pw]
        return covered.unflatten(-1, (self.gw, self.pw)).unflatten(-3, (self.gh, self.ph))


def halves(n_patches: int, seed: int) -> Tensor:
    """A random half of the patches and the other half: masks [2, P] on the CPU, neither of them empty."""
    random = torch.Generator(device="cpu").manual_seed(seed)
    rank = torch.randperm(n_patches, generator=random, device="cpu")
    return torch.stack([rank < n_patches // 2, rank >= n_patches // 2])


def other_orders(gh: int, gw: int) -> list[Tensor]:
    """The patches [P] in the order of the mirrored, turned and transposed grid, where that is another order."""
    patch = torch.arange(gh * gw, device="cpu").reshape(gh, gw)
    ways = [each for grid in (patch, patch.mT) for each in (grid, grid.flip(0), grid.flip(1), grid.flip(0, 1))]
    different = dict.fromkeys(tuple(way.flatten().tolist()) for way in ways)
    return [torch.tensor(order, device="cpu") for order in different if order != tuple(range(gh * gw))]


def asymmetric_halves(gh: int, gw: int) -> Tensor:
    """:func:`halves` of the grid that differ in each of :func:`other_orders`. So they tell these orders apart."""
    orders = other_orders(gh, gw)
    for seed in count():
        masks = halves(gh * gw, seed)
        if gh == gw == 2:  # each half of four patches has a symmetry; these two masks have none in common
            masks[1, masks[0].nonzero()[0]] = True
        if all(not torch.equal(masks[:, order], masks) for order in orders):
            return masks
    raise AssertionError("count ends")
