"""Where the patches lie in the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """``gh x gw`` patches of ``ph x pw`` pixels; patch ``i`` is at row ``i // gw``, column ``i % gw``."""

    gh: int
    gw: int
    ph: int
    pw: int

    @classmethod
    def of(cls, image_size: tuple[int, int], grid: tuple[int, int]) -> PatchGrid:
        """The patches of an image of (height, width) pixels under ``grid`` = (gh, gw), which must divide it."""
        (H, W), (gh, gw) = image_size, grid
        if H % gh or W % gw:
            raise ValueError(f"maps: expected a grid that divides the images' {H} x {W} pixels, got {gh} x {gw}")
        return cls(gh, gw, H // gh, W // gw)

    @property
    def n_patches(self) -> int:
        return self.gh * self.gw

    def to_pixels(self, per_patch: Tensor) -> Tensor:
        """Values of patches [..., P] -> values of pixels [..., H, W]."""
        grid = per_patch.unflatten(-1, (self.gh, self.gw))
        return grid.repeat_interleave(self.ph, dim=-2).repeat_interleave(self.pw, dim=-1)

    def sum_pixels(self, image: Tensor) -> Tensor:
        """Sums over each patch's pixels and channels: ``image`` [C, H, W] -> [P]."""
        return image.unflatten(-1, (self.gw, self.pw)).unflatten(-3, (self.gh, self.ph)).sum((0, 2, 4)).flatten()
