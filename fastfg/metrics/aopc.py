"""AOPC (Samek et al. 2017): the mean drop of the probability along the MIF curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import CurveMetric, most_important_first, shares
from fastfg.metrics.metric import Plan
from fastfg.perturb import PatchGrid, Readings


@dataclass(frozen=True, kw_only=True, eq=False)
class AOPC(CurveMetric):
    """``1 / (L + 1) * sum of f(x_0) - f(x_k) over k = 0 .. L``; higher is better (Samek et al. 2017, eq. 12).

    ``x_0`` is the image as it is, ``x_k`` the image after ``k`` steps, most important patches first. Samek et al. stop
    after 100 regions and fill them with noise; here the curve ends when no patch is left.

    Details: ``x`` [steps + 1], the share of removed patches, and ``curve`` [steps + 1].
    """

    name: ClassVar[str] = "aopc"
    title: ClassVar[str] = "AOPC"
    short: ClassVar[str] = "AOPC"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1"
    cost: ClassVar[str] = "the curve of deletion"
    source: ClassVar[str] = "Samek et al. 2017"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "As deletion: where all steps are of one size, both order the maps of an image in the same way."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        return self._along(most_important_first(maps))

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        curve = readings.prob
        return (curve[:, :1] - curve).mean(1), {"x": shares(plan.masks), "curve": curve}
