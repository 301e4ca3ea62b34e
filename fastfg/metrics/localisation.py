"""The base class of the metrics that compare a map with a mask of the object, patch by patch and without forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan
from fastfg.perturb import PatchGrid, Readings

EMPTY_MASK = "the mask is empty: no patch overlaps with it"
FULL_MASK = "the mask covers every patch"


@dataclass(frozen=True, kw_only=True, eq=False)
class Localisation(Metric):
    """Base class of the localisation metrics. A subclass defines ``compare``.

    The share of a patch is the part of its area that lies inside the mask; pixels that belong to no patch do not
    count. A patch is inside where its share is at least ``min_share``.

    A score is NaN, with a reason, where a mask can't tell one map from another: where no patch overlaps with it, where
    no patch is inside although some overlap, and where every patch is inside.

    Args:
        masks: [B, H, W], bool or floating in [0, 1], in the geometry of the images; usually given to
            ``evaluate(masks=)``.
        min_share: the least share of a patch inside the mask, > 0 and at most 1.
    """

    perturbs: ClassVar[bool] = False
    by_share: ClassVar[bool] = False  # whether min_share may be None: each patch counts by its share
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "[0, 1]"
    cost: ClassVar[str] = "0"

    masks: Tensor | None = None
    min_share: float | None = 0.5

    def __post_init__(self) -> None:
        if self.min_share is not None or not self.by_share:
            check_share(self.name, "min_share", self.min_share)
        if self.masks is not None:
            check_masks(f"{self.name}: ", self.masks)

    def compare(self, maps: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [C] and details of ``maps`` [C, P], float64, for one mask: ``inside`` [P] bool."""
        raise NotImplementedError

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        assert self.masks is not None  # check_images
        size = [grid.gh * grid.ph + grid.bottom, grid.gw * grid.pw + grid.right]
        if list(self.masks.shape[1:]) != size:
            raise ValueError(
                f"masks: expected [B, {size[0]}, {size[1]}], the size of the images, got {list(self.masks.shape)}"
            )
        share = grid.sum_pixels(self.masks.detach().double().cpu()) / (grid.ph * grid.pw)
        nothing = torch.zeros(len(maps), 0, maps.shape[1], dtype=torch.bool, device="cpu")
        return Plan(nothing, details={"share": share.expand_as(maps)}, n_unperturbed=0)

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compare(maps, self.is_inside(plan.details["share"][0]))

    def is_inside(self, share: Tensor) -> Tensor:
        """Which patches are inside the mask, by their ``share`` of it."""
        assert self.min_share is not None
        return share >= self.min_share

    def reading(self, readings: Readings) -> Tensor:
        return readings.prob[:, :0]  # none

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        return [self.why_undefined(share) for share in plan.details["share"]]

    def why_undefined(self, share: Tensor) -> str | None:
        """Why no map has a score for this mask, or None. ``share`` [P]: how much of each patch lies inside."""
        if not bool((share > 0).any()):
            return EMPTY_MASK
        inside = self.is_inside(share)
        if not bool(inside.any()):
            return f"no patch has {self.min_share:g} of its area inside the mask, the most is {float(share.max()):.2g}"
        return FULL_MASK if bool(inside.all()) else None

    def per_image(self) -> dict[str, int]:
        return super().per_image() | ({} if self.masks is None else {"masks": 0})

    def check_images(self, n_images: int) -> None:
        if self.masks is None:
            raise ValueError(f"masks: expected [{n_images}, H, W], one per image, for {self.name}, got none")
        super().check_images(n_images)


def with_masks(metrics: Sequence[Metric], masks: Tensor | None) -> list[Metric]:
    """``metrics``, with ``masks`` for those that compare maps with masks and were given none of their own."""
    if masks is None:
        return list(metrics)
    check_masks("", masks)
    takes = [isinstance(metric, Localisation) and metric.masks is None for metric in metrics]
    if not any(takes):
        names = tuple(metric.name for metric in metrics)
        raise ValueError(f"masks: expected none, as no metric among {names} takes them, got {list(masks.shape)}")
    return [metric.changed(masks=masks) if takes else metric for metric, takes in zip(metrics, takes, strict=True)]


def check_masks(where: str, masks: Any) -> None:
    """Require masks [B, H, W], bool or floating in [0, 1]."""
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        got = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"{where}masks: expected a tensor [B, H, W], got {got}")
    if masks.dtype != torch.bool and not masks.is_floating_point():
        raise ValueError(f"{where}masks: expected bool, or floating in [0, 1], got {masks.dtype}")
    if masks.is_floating_point() and not bool(((masks >= 0) & (masks <= 1)).all()):
        low, high = float(masks.min()), float(masks.max())
        raise ValueError(f"{where}masks: expected values in [0, 1], got {low:g} to {high:g}")


def check_share(metric: str, name: str, value: Any) -> None:
    """Require a number > 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{metric}: expected {name} > 0 and at most 1, got {value!r}")
