"""Insertion (Petsiuk et al. 2018): the area under the curve when the most important patches come back first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import AreaMetric, least_important_first
from fastfg.metrics.metric import Plan
from fastfg.perturb import PatchGrid


@dataclass(frozen=True, kw_only=True, eq=False)
class Insertion(AreaMetric):
    """Mean height of the curve that starts with all patches removed; higher is better (Petsiuk et al. 2018, RISE).

    It is the LIF curve read backwards, so it has the same area. Petsiuk et al. insert into a blurred image
    (``baseline="blur"``); here the default is that of the evaluation.

    Details: ``x`` [steps + 1], the share of removed patches, ``curve`` [steps + 1] in the order of the LIF curve, and
    the areas ``raw`` and ``normalised``.
    """

    name: ClassVar[str] = "insertion"
    title: ClassVar[str] = "Insertion"
    short: ClassVar[str] = "Ins"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "0 to 1"
    cost: ClassVar[str] = "one curve"
    source: ClassVar[str] = "Petsiuk et al. 2018"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "Depends on what the image starts from: a blurred image already shows much. A confident model has a high area "
        "under any map."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        return self._along(least_important_first(maps))
