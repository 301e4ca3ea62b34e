"""Deletion (Petsiuk et al. 2018): the area under the curve when the most important patches go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import AreaMetric, most_important_first
from fastfg.metrics.metric import Plan
from fastfg.perturb import PatchGrid


@dataclass(frozen=True, kw_only=True, eq=False)
class Deletion(AreaMetric):
    """Mean height of the MIF curve of the target's probability; lower is better (Petsiuk et al. 2018, RISE).

    Details: ``x`` [steps + 1], the share of removed patches, ``curve`` [steps + 1], and the areas ``raw`` and
    ``normalised``.
    """

    name: ClassVar[str] = "deletion"
    title: ClassVar[str] = "Deletion"
    short: ClassVar[str] = "Del"
    higher_is_better: ClassVar[bool] = False
    value_range: ClassVar[str] = "0 to 1"
    cost: ClassVar[str] = "one curve"
    source: ClassVar[str] = "Petsiuk et al. 2018"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "The fill is out of the training distribution: a curve can fall because the image looks strange. An unsure "
        "model has a low area under any map."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        return self._along(most_important_first(maps))
