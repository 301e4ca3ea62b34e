"""Infidelity (Yeh et al. 2019) on patches: does the summed attribution equal the drop of the logit?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.metric import Plan
from fastfg.metrics.subsets import SubsetMetric
from fastfg.perturb import Readings


@dataclass(frozen=True, kw_only=True, eq=False)
class Infidelity(SubsetMetric):
    """Mean over random subsets ``S`` of ``(sum of attributions in S - (f(none) - f(S)))^2``; lower is better.

    ``f`` is the logit. The perturbation replaces the patches of ``S`` by the baseline, so ``I^T phi`` of Yeh et al. is
    the sum of the attributions of these patches, each of which counts once. The subsets are those of
    ``faithfulness_correlation``, and their forwards are shared.

    A map without units, such as relevancy, has any scale. ``scaled`` in the details is the infidelity of the map times
    ``scale``, the number that makes it smallest: ``scale = sum(a d) / sum(a^2)``. :func:`fastfg.study.paired` does not
    test this metric, as each variant has a scale of its own.

    Details: ``scale`` [], ``scaled`` [], ``drop`` [n_trials, n_runs] and ``subsets``.
    """

    name: ClassVar[str] = "infidelity"
    title: ClassVar[str] = "Infidelity"
    short: ClassVar[str] = "Inf"
    higher_is_better: ClassVar[bool] = False
    depends_on_scale: ClassVar[bool] = True
    value_range: ClassVar[str] = "0 and above, in squared logits"
    cost: ClassVar[str] = "0 beside faithfulness_correlation, else 60, shared by all maps of an image"
    source: ClassVar[str] = "Yeh et al. 2019"
    together: ClassVar[tuple[str, ...]] = ("score",)
    failings: ClassVar[str] = (
        "Depends on the scale of the map: it does not compare relevancy maps unless they are scaled (see the details)."
    )

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        subsets = plan.details["subsets"]
        attribution, drop = self.both_sides(maps, subsets, readings)
        a, d = attribution.flatten(1), drop.flatten(1)
        power = a.square().sum(1)
        scale = torch.where(power > 0, (a * d).sum(1) / torch.where(power > 0, power, 1.0), 0.0)
        scaled = (scale[:, None] * a - d).square().mean(1)
        return (a - d).square().mean(1), {"scale": scale, "scaled": scaled, "drop": drop, "subsets": subsets}
