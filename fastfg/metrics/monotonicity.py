"""Monotonicity (Arya et al. 2019): does each patch that comes back leave the reading at least as high?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import CurveMetric, least_important_first, shares
from fastfg.metrics.metric import Plan, tied_in_half
from fastfg.perturb import PatchGrid, Readings

NOT_LOWER = 1e-6  # of the curve's largest reading: a step that lowers it by less does so by rounding
OF_STEPS = "the steps change nothing"


@dataclass(frozen=True, kw_only=True, eq=False)
class Monotonicity(CurveMetric):
    """Share of the steps along the insertion curve that do not lower the probability; higher is better.

    Arya et al. 2019 (AI Explainability 360) ask whether no step lowers it: ``monotonic``. A step that lowers the
    reading by less than 1e-6 of the largest reading of its curve counts as one that does not.

    Details: ``x`` [steps + 1], ``curve`` [steps + 1] in the order of the LIF curve, ``monotonic`` (1 or 0), and
    ``tied`` [], the share of the steps that change the reading by less than that.
    """

    name: ClassVar[str] = "monotonicity"
    title: ClassVar[str] = "Monotonicity"
    short: ClassVar[str] = "Mono"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "0 to 1"
    cost: ClassVar[str] = "the curve of insertion"
    source: ClassVar[str] = "Arya et al. 2019"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "Counts steps and not their size: a map whose best patches come last can do as well as a good one. Saturated "
        "readings count as not lowered (`tied` in the details): where half precision makes more than 10% of the steps "
        "change nothing, the score is an error."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        return self._along(least_important_first(maps))

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        kept, tied = self._steps(readings)
        details = {"x": shares(plan.masks), "curve": readings.prob, "monotonic": kept.amin(1), "tied": tied.mean(1)}
        return kept.mean(1), details

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        tied = tied_in_half(self._steps(readings)[1].mean(1), OF_STEPS, eps)
        return [reason or why for reason, why in zip(reasons, tied, strict=True)]

    @staticmethod
    def _steps(readings: Readings) -> tuple[Tensor, Tensor]:
        """1 or 0 per step [C, steps]: whether it does not lower the reading, and whether it changes nothing."""
        curve = readings.prob
        gains = curve[:, :-1] - curve[:, 1:]  # read backwards, from the image without patches
        rounding = NOT_LOWER * curve.abs().amax(1, keepdim=True)
        return (gains >= -rounding).double(), (gains.abs() <= rounding).double()
