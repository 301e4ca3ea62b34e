"""SaCo (Wu et al. 2024): do groups of patches with more attribution have more impact?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan, as_float64, check_integer, descending, tied_in_half
from fastfg.perturb import PatchGrid, Readings

IMPACTS = ("target", "max")
OF_WEIGHT = "the weight is of pairs of groups with the same impact"


def saco_score(group_attribution: Tensor, impact: Tensor) -> Tensor:
    """``sum(sign * weight) / sum(weight)`` over all pairs of the ``G`` groups: [...], float64, in [-1, 1].

    Both arguments are [..., G]: the attributions ``a`` and the impacts ``d``. A pair with ``a_i >= a_j`` has weight
    ``a_i - a_j``, and its sign is + unless ``(d_i - d_j)(a_i - a_j) < 0``. The score is 0 where all weights are 0, and
    NaN where either argument has a NaN or an infinity.

    >>> import torch
    >>> float(saco_score(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([0.5, 0.1, 0.2])))  # weights 1, 3, 2
    0.3333333333333333
    """
    return _score_and_ties(group_attribution, impact)[0]


def _score_and_ties(group_attribution: Tensor, impact: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`saco_score`, and the share of the weight that is of pairs with the same impact."""
    a, d = as_float64(group_attribution), as_float64(impact)
    if a.shape != d.shape or a.ndim == 0:
        raise ValueError(f"impact: expected {list(a.shape)}, as group_attribution [..., G], got {list(d.shape)}")
    i, j = torch.triu_indices(a.shape[-1], a.shape[-1], offset=1, device=a.device)
    attribution, effect = a[..., i] - a[..., j], d[..., i] - d[..., j]
    weight = attribution.abs()
    signed = torch.where(effect * attribution < 0, -weight, weight).sum(-1)
    tied = torch.where(effect == 0, weight, 0.0).sum(-1)
    total = weight.sum(-1)
    defined = a.isfinite().all(-1) & d.isfinite().all(-1)
    shares = (torch.where(total == 0, 0.0, part / torch.where(total == 0, 1.0, total)) for part in (signed, tied))
    score, share = (torch.where(defined, values, torch.nan) for values in shares)
    return score, share


@dataclass(frozen=True, kw_only=True, eq=False)
class SaCo(Metric):
    """Sort the patches by attribution, split them into ``n_bins`` groups, and remove one group at a time.

    Details: ``group_attribution`` [n_bins], ``impact`` [n_bins] = ``p(y|x) - p(y|x without the group)``, and ``tied``
    [], the share of the weight that is of pairs with the same impact. These count as agreement.

    Args:
        n_bins: number of groups. None is ``ceil(P / 4)``, at least 2.
        impact: ``target`` uses the probability of the original class. ``max`` uses the perturbed image's largest
            probability, of any class (as in the author's program).
    """

    name: ClassVar[str] = "saco"
    title: ClassVar[str] = "SaCo"
    short: ClassVar[str] = "SaCo"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1, about 0 for a random map"
    cost: ClassVar[str] = "one per group, ceil(P / 4)"
    source: ClassVar[str] = "Wu et al. 2024"
    together: ClassVar[tuple[str, ...]] = ("plan", "score")
    failings: ClassVar[str] = (
        "Each group alone has a small impact on a sure model, so the order of impacts is noisy. Weights come from the "
        "map itself: a monotone transform of the map changes the score. Pairs of groups with the same impact count as "
        "agreement (`tied` in the details): where half precision makes more than 10% of the weight such pairs, the "
        "score is an error."
    )

    n_bins: int | None = None
    impact: str = "target"

    def __post_init__(self) -> None:
        if self.impact not in IMPACTS:
            raise ValueError(f"saco: expected impact to be one of {IMPACTS}, got {self.impact!r}")
        if self.n_bins is not None:
            check_integer(self.name, "n_bins", self.n_bins, 2)

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        C, P = maps.shape
        n_bins = max(2, math.ceil(P / 4)) if self.n_bins is None else self.n_bins
        if not 2 <= n_bins <= P:
            raise ValueError(f"saco: expected n_bins from 2 to {P} patches, got {n_bins}")
        rank = group_of_rank(P, n_bins).expand(C, P)
        group = torch.empty_like(maps, dtype=torch.long).scatter_(1, descending(maps), rank)
        attribution = maps.new_zeros(C, n_bins).scatter_add_(1, group, maps)
        masks = group[:, None, :] == torch.arange(n_bins, device="cpu")[:, None]
        return Plan(masks, details={"group_attribution": attribution})

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        attribution, impact = plan.details["group_attribution"], self._impact(readings)
        score, tied = _score_and_ties(attribution, impact)
        return score, {"group_attribution": attribution, "impact": impact, "tied": tied}

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        attribution, impact = plan.details["group_attribution"], self._impact(readings)
        for c, (same_attribution, same_impact) in enumerate(zip(_same(attribution), _same(impact), strict=True)):
            if reasons[c] is None and same_attribution:
                reasons[c] = "all groups of patches have the same attribution"
            elif reasons[c] is None and same_impact:
                reasons[c] = "all groups of patches have the same impact"
        tied = tied_in_half(_score_and_ties(attribution, impact)[1], OF_WEIGHT, eps)
        return [reason or why for reason, why in zip(reasons, tied, strict=True)]

    def reading(self, readings: Readings) -> Tensor:
        """The probability of the original class for the unperturbed image, then the probability without each group."""
        left = readings.prob if self.impact == "target" else readings.max_prob
        return torch.cat([readings.prob[:, :1], left[:, 1:]], dim=1)

    def _impact(self, readings: Readings) -> Tensor:
        values = self.reading(readings)
        return values[:, :1] - values[:, 1:]


def _same(values: Tensor) -> list[bool]:
    """Per row of ``values`` [C, n], whether all are equal."""
    found: list[bool] = (values == values[:, :1]).all(1).tolist()
    return found


def group_of_rank(n_patches: int, n_bins: int) -> Tensor:
    """The group of each rank [P], split as by NumPy's ``array_split``: the first groups are the larger ones."""
    size, larger = divmod(n_patches, n_bins)
    sizes = torch.full((n_bins,), size, device="cpu")
    sizes[:larger] += 1
    return torch.arange(n_bins, device="cpu").repeat_interleave(sizes)
