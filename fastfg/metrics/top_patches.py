"""Comprehensiveness and sufficiency (DeYoung et al. 2020): the drop without the top patches, and with them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import check_parts, most_important_first, patches_of
from fastfg.metrics.metric import Metric, Plan
from fastfg.perturb import PatchGrid, Readings

PUBLISHED = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class TopPatches(Metric):
    """Base class: the mean drop of the probability over the shares ``k``.

    Args:
        k: shares of the patches, one or several, each between 0 and 1. The nearest number of patches is taken, from
            one patch to all but one. The default is that of DeYoung et al.
    """

    k: float | Sequence[float] = PUBLISHED

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_parts(self.name, "k", self.k))

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        drop = readings.prob[:, :1] - readings.prob[:, 1:]
        return drop.mean(1), {"drop": drop, "patches": plan.details["patches"]}

    def _top(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The masks [C, n_k, P] of the top patches, and their numbers [C, n_k]."""
        C, P = maps.shape
        assert isinstance(self.k, tuple)  # __post_init__
        counts = patches_of(self.k, P)
        rank = most_important_first(maps).argsort(dim=-1)
        return rank[:, None, :] < counts[:, None], counts.expand(C, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comprehensiveness(TopPatches):
    """Mean drop when the top share ``k`` of the patches is removed; higher is better (DeYoung et al. 2020).

    Details: ``drop`` [n_k] and ``patches`` [n_k], the number of removed patches.
    """

    name: ClassVar[str] = "comprehensiveness"
    title: ClassVar[str] = "Comprehensiveness"
    short: ClassVar[str] = "Comp"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1"
    cost: ClassVar[str] = "5, or 0 beside deletion in steps of 1"
    source: ClassVar[str] = "DeYoung et al. 2020"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = "Redundant evidence: if two regions each suffice, removing one changes little."

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        masks, counts = self._top(maps)
        return Plan(masks, details={"patches": counts})


@dataclass(frozen=True, kw_only=True, eq=False)
class Sufficiency(TopPatches):
    """Mean drop when only the top share ``k`` of the patches is kept; lower is better (DeYoung et al. 2020).

    Details: ``drop`` [n_k] and ``patches`` [n_k], the number of kept patches.
    """

    name: ClassVar[str] = "sufficiency"
    title: ClassVar[str] = "Sufficiency"
    short: ClassVar[str] = "Suff"
    higher_is_better: ClassVar[bool] = False
    value_range: ClassVar[str] = "-1 to 1"
    cost: ClassVar[str] = "5, or 0 beside insertion in steps of 1"
    source: ClassVar[str] = "DeYoung et al. 2020"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = "Most of the image is filled, so the readings are the furthest from real images."

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        masks, counts = self._top(maps)
        return Plan(~masks, details={"patches": counts})
