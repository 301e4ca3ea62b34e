"""ROAD (Rong et al. 2022): the least against the most important patches first, filled by noisy linear imputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import check_parts, least_important_first, most_important_first, patches_of
from fastfg.metrics.metric import Metric, Plan
from fastfg.perturb import Baseline, PatchGrid, Readings

PUBLISHED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True, eq=False)
class ROAD(Metric):
    """Mean over the shares of the LIF reading less the MIF reading; higher is better, about 0 for a random map.

    At each share, that part of the patches is removed, the least important first (LIF) or the most important first
    (MIF), and filled from their neighbours (:func:`fastfg.perturb.imputation.impute`), so that the fill itself says
    little about which patches were removed. Rong et al. report the accuracy over a data set at each share, once per
    order. Here the target's probability is read, which gives a score per image; the details have both orders.

    Details: ``share`` [n], the part of the patches that is removed, ``mif`` [n] and ``lif`` [n].

    Args:
        shares: each above 0 and below 1; the nearest number of patches is removed, from one patch to all but one. The
            default are the published nine.
    """

    name: ClassVar[str] = "road"
    title: ClassVar[str] = "ROAD"
    short: ClassVar[str] = "ROAD"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1, about 0 for a random map"
    cost: ClassVar[str] = "18, each with a sparse linear system of the removed pixels"
    source: ClassVar[str] = "Rong et al. 2022"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "The imputation is smooth: large removed regions still look unlike photographs, and can leave the object's "
        "outline. Slow, and always run from the pixels."
    )

    baseline: Baseline | None = "imputed"
    shares: float | Sequence[float] = PUBLISHED

    def __post_init__(self) -> None:
        if self.baseline != "imputed":
            raise ValueError(f"road: expected baseline='imputed', which defines it, got {self.baseline!r}")
        object.__setattr__(self, "shares", check_parts(self.name, "shares", self.shares))

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        P = maps.shape[1]
        assert isinstance(self.shares, tuple)  # __post_init__
        counts = patches_of(self.shares, P)
        ranks = (order(maps).argsort(dim=-1) for order in (most_important_first, least_important_first))
        masks = torch.cat([rank[:, None, :] < counts[:, None] for rank in ranks], dim=1)
        return Plan(masks, details={"share": (counts / P).double().expand(len(maps), -1)})

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        mif, lif = readings.prob[:, 1:].chunk(2, dim=1)
        return (lif - mif).mean(1), {"share": plan.details["share"], "mif": mif, "lif": lif}

    def reading(self, readings: Readings) -> Tensor:
        return readings.prob
