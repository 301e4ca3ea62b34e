"""Intersection over union of the mask and the patches above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.localisation import Localisation
from fastfg.metrics.metric import ROUNDING


@dataclass(frozen=True, kw_only=True, eq=False)
class IoU(Localisation):
    """Intersection over union of two sets of patches: those inside the mask, and those above the map's threshold.

    The threshold lies between the map's smallest and largest attribution, so negative attributions are treated like
    all others. This is the IoU of the object, per image. Chefer et al. 2021 report the mean of the IoU of object and
    background, summed over a data set.

    Details: ``n_above``, the number of patches above the threshold.

    Source: Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, for the
    threshold at the mean; Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, for one at
    a part of the range (0.2 there).

    Args:
        threshold: ``mean`` (the mean of the map), or a number from 0 to below 1: the part of the way from the map's
            smallest to its largest attribution. A patch counts where its attribution is larger.
    """

    name: ClassVar[str] = "iou"
    title: ClassVar[str] = "IoU"
    short: ClassVar[str] = "IoU"
    source: ClassVar[str] = "Chefer et al. 2021"
    failings: ClassVar[str] = "depends on the threshold and on the map's scale: sharper maps have smaller areas"

    threshold: str | float = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (0 <= float(self.threshold) < 1 if number else self.threshold == "mean"):
            raise ValueError(f"iou: expected threshold 'mean' or from 0 to below 1, got {self.threshold!r}")

    def compare(self, maps: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.threshold == "mean":
            least = maps.mean(1, keepdim=True)
        else:
            low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
            least = low + float(self.threshold) * (high - low)
        rounding = ROUNDING * torch.finfo(torch.float32).eps * maps.abs().amax(1, keepdim=True)
        above = maps > least + rounding  # a patch at the threshold is not above it, whatever the map's dtype was
        both, either = (above & inside).sum(1), (above | inside).sum(1)
        return both.double() / either, {"n_above": above.sum(1)}
