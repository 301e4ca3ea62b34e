"""Monotonicity (Arya et al. 2019): does each patch that comes back leave the reading at least as high?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import CurveMetric, least_important_first, shares
from fastfg.metrics.metric import Plan
from fastfg.perturb import PatchGrid, Readings

NOT_LOWER = 1e-6  # of the curve's largest reading: a step that lowers it by less does so by rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Monotonicity(CurveMetric):
    """Share of the steps along the insertion curve that do not lower the probability; higher is better.

    Arya et al. 2019 (AI Explainability 360) ask whether no step lowers it: ``monotonic``. A step that lowers the
    reading by less than 1e-6 of the largest reading of its curve counts as one that does not.

    Details: ``x`` [steps + 1], ``curve`` [steps + 1] in the order of the LIF curve, and ``monotonic`` (1 or 0).
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
        "readings count as not lowered."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        return self._along(least_important_first(maps))

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        curve = readings.prob
        gains = curve[:, :-1] - curve[:, 1:]  # read backwards, from the image without patches
        kept = (gains >= -NOT_LOWER * curve.abs().amax(1, keepdim=True)).double()
        details = {"x": shares(plan.masks), "curve": curve, "monotonic": kept.amin(1)}
        return kept.mean(1), details
