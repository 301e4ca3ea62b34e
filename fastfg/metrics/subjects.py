"""The images under evaluation, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric
from fastfg.models import Adapter
from fastfg.perturb import REMOVED, Baseline, Fill, Imputed, PatchGrid, Readings, generator, make_fill
from fastfg.perturb.fills import is_named
from fastfg.perturb.imputation import impute
from fastfg.targets import Target


@dataclass
class Images:
    """The images under evaluation.

    Attributes:
        images: [B, C, H, W]. keys: one per image; random draws depend on it.
    """

    images: Tensor
    keys: Sequence[str]
    grid: PatchGrid
    seed: int
    adapter: Adapter | None

    def random(self, image: int, purpose: str) -> torch.Generator:
        return generator(self.seed, self.keys[image], purpose)

    def fill(self, image: int, baseline: Baseline) -> Fill:
        """What fills the removed patches of one image; a tensor ``baseline`` is that of this image alone."""
        if is_named(baseline, "removed"):
            return REMOVED
        if is_named(baseline, "imputed"):
            noise = self.random(image, "baseline")
            return Imputed(lambda masks: impute(self.images[image], masks, self.grid, noise))
        mean, std = (self.adapter.pixel_mean, self.adapter.pixel_std) if self.adapter is not None else (None, None)
        random = self.random(image, "baseline")
        return make_fill(baseline, self.images[image], 0, self.grid, random, mean, std)

    def fills(self, metrics: Sequence[Metric], image: int) -> list[Fill]:
        """What fills the removed patches of one image, once per baseline of ``metrics``."""
        by_baseline = {id(m.baseline) if isinstance(m.baseline, Tensor) else m.baseline: m for m in metrics}
        own = [metric.for_images(slice(image, image + 1)).baseline for metric in by_baseline.values()]
        return [self.fill(image, baseline) for baseline in own if baseline is not None]

    @cached_property
    def blank(self) -> list[bool]:
        """Whether all pixels of an image are equal, per image."""
        pixels = self.images.flatten(2)
        return (pixels == pixels[..., :1]).all(-1).all(-1).tolist()


class Unperturbed(NamedTuple):
    """What the model makes of the images as they are.

    Attributes:
        readings: [B], on the CPU. target: of the ``B`` images, see :meth:`fastfg.Target.of`.
        eps: the rounding of the output's dtype; 0 for half precision, whose rounding is no measure of an effect. The
            output of a model of a known family in half precision counts as such in any dtype.
        width: how many numbers of the output the target reads per image: all logits, for a class.
    """

    readings: Readings
    target: Target
    eps: float
    width: int
