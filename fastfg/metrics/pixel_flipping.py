"""Pixel Flipping (Bach et al. 2015) on patches: how fast does the probability fall if the best patches go first?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import CurveMetric, most_important_first
from fastfg.metrics.metric import Plan, as_float64
from fastfg.perturb import PatchGrid, Readings


def area(curve: Tensor) -> Tensor:
    """Area under ``curve`` [..., n] by the trapezoid rule with dx = 1, not normalised: [...], float64.

    >>> import torch
    >>> float(area(torch.tensor([1.0, 0.5, 0.0])))
    1.0
    """
    curve = as_float64(curve)
    if curve.ndim == 0 or curve.shape[-1] < 2:
        raise ValueError(f"curve: expected [..., n] with at least 2 points, got {list(curve.shape)}")
    return torch.trapezoid(curve, dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelFlipping(CurveMetric):
    """Remove patches in descending order of attribution until none is left; lower is better.

    Details: ``curve`` [steps + 1], the target's probability for the unperturbed image and after each step.

    Args:
        patches_per_step: how many patches each step removes.
    """

    name: ClassVar[str] = "pixel_flipping"
    title: ClassVar[str] = "Pixel Flipping"
    short: ClassVar[str] = "PF"
    higher_is_better: ClassVar[bool] = False
    value_range: ClassVar[str] = "0 to the number of steps"
    cost: ClassVar[str] = "the curve of deletion"
    source: ClassVar[str] = "Bach et al. 2015"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "As deletion. Not divided by the number of steps: models with other grids, or other steps, do not compare."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        return self._along(most_important_first(maps))

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        return area(readings.prob), {"curve": readings.prob}
