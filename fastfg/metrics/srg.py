"""SRG (Bluecher et al. 2024): the area between the curves of the least and of the most important patches first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.curves import CurveMetric, least_important_first, mean_height, most_important_first, removal_masks
from fastfg.metrics.metric import Plan
from fastfg.perturb import PatchGrid, Readings
from fastfg.perturb.fills import is_named


@dataclass(frozen=True, kw_only=True, eq=False)
class SRG(CurveMetric):
    """Symmetric relevance gain: the LIF curve's area less the MIF curve's; higher is better.

    Bluecher et al. 2024 (arXiv 2401.06654) show that it depends less on the fill than either curve alone, since what
    an unusual fill does to the model happens to both. It is about 0 for a random map.

    Details: ``x`` [steps + 1], the share of removed patches, ``mif`` and ``lif`` [steps + 1].
    """

    name: ClassVar[str] = "srg"
    title: ClassVar[str] = "SRG"
    short: ClassVar[str] = "SRG"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1, about 0 for a random map"
    cost: ClassVar[str] = "the curves of deletion and insertion"
    source: ClassVar[str] = "Bluecher et al. 2024"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "Large where the model is sure and the image easy: compare maps on the same images only. Says nothing about "
        "the order among patches that do not matter."
    )

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        if is_named(self.baseline, "running_mean"):
            raise ValueError("srg: expected a baseline that does not depend on the order, got 'running_mean'")
        self._check_steps(maps.shape[1])
        orders = (most_important_first(maps), least_important_first(maps))
        mif, lif = (removal_masks(order, self.patches_per_step) for order in orders)
        masks = torch.cat([mif[:, :-1], lif[:, :-1], mif[:, -1:]], dim=1)  # both curves end without any patch
        return Plan(masks, order=orders[0])  # with an order, the last mask is left out for a model that can't read it

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        x, mif, lif = self._curves(plan, readings.prob)
        return mean_height(x, lif) - mean_height(x, mif), {"x": x, "mif": mif, "lif": lif}

    @staticmethod
    def _curves(plan: Plan, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The shares and the two curves, each [C, n]. They end without any patch if the model has such a reading."""
        shared = plan.masks.shape[1] % 2  # the last mask, which both curves end with
        m = (plan.masks.shape[1] - shared) // 2
        first, mif, lif, last = values.split([1, m, m, shared], dim=1)
        removed = plan.masks.sum(-1).double() / plan.masks.shape[2]
        x = torch.cat([removed.new_zeros(len(removed), 1), removed[:, :m], removed[:, 2 * m :]], dim=1)
        return x, torch.cat([first, mif, last], dim=1), torch.cat([first, lif, last], dim=1)
