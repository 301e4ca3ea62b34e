"""Faithfulness Correlation (Bhatt et al. 2020): does a subset's attribution predict how far the logit drops?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.metric import Plan, as_float64
from fastfg.metrics.subsets import SubsetMetric
from fastfg.perturb import Readings

KINDS = ("spearman", "pearson")
FLAT = 1e-10  # a standard deviation below this counts as no variation


def correlation(a: Tensor, b: Tensor, kind: str = "spearman") -> Tensor:
    """Correlation of ``a`` and ``b`` [..., n] over the last dimension: [...], float64.

    ``kind`` is ``spearman`` (ties get their average rank) or ``pearson``. The result is 0 where the standard deviation
    of ``a`` or ``b`` is below 1e-10, and NaN where either has a NaN or an infinity.

    >>> import torch
    >>> float(correlation(torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 3.0, 9.0])))
    1.0
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    a, b = as_float64(a), as_float64(b)
    if a.shape[-1:] != b.shape[-1:] or a.ndim == 0:
        raise ValueError(f"b: expected [..., {list(a.shape)[-1:]}], as a, got {list(b.shape)}")
    flat = is_flat(a) | is_flat(b)
    defined = a.isfinite().all(-1) & b.isfinite().all(-1)
    x, y = (ranks(a), ranks(b)) if kind == "spearman" else (_in_range(a), _in_range(b))
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    norm = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    result = (x * y).sum(-1) / torch.where(flat, 1.0, norm)
    result = torch.where(flat, 0.0, result.clamp(-1, 1))
    return torch.where(defined, result, torch.nan)


def _in_range(values: Tensor) -> Tensor:
    """``values`` [..., n], scaled where their squares would overflow or vanish."""
    largest = values.abs().amax(-1, keepdim=True)
    return torch.where((largest > 1e100) | ((largest < 1e-100) & (largest > 0)), values / largest, values)


def is_flat(values: Tensor) -> Tensor:
    """Whether ``values`` [..., n] have a standard deviation below 1e-10: [...]."""
    return values.std(-1, correction=0) < FLAT


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 over the last dimension, equal values sharing their average rank."""
    this, others = values.unsqueeze(-1), values.unsqueeze(-2)
    return (this > others).sum(-1) + ((this == others).sum(-1).double() + 1) / 2


def check_correlation(metric: str, kind: str) -> None:
    """Raise ValueError where the option ``correlation`` of a metric is not one of :data:`KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"{metric}: expected correlation in {KINDS}, got {kind!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class FaithfulnessCorrelation(SubsetMetric):
    """Correlation between the summed attribution of random subsets and the drop of the target's logit without them.

    The subsets do not depend on the map, so several maps of one image share their forwards.

    Details: ``drop`` [n_trials, n_runs], ``subsets`` [n_trials, n_runs, subset_size] (the same for every map).

    Args:
        n_runs: subsets per trial. n_trials: the trials whose correlations are averaged.
        subset_size: patches per subset; None is 20 where P >= 100, else ``max(2, round(P / 5))``.
        correlation: ``spearman`` or ``pearson``.
        subsets: [n_trials, n_runs, B, subset_size] patch indices to use instead of random subsets.
    """

    name: ClassVar[str] = "faithfulness_correlation"
    title: ClassVar[str] = "Faithfulness Correlation"
    short: ClassVar[str] = "FC"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1, about 0 for a random map"
    cost: ClassVar[str] = "60, shared by all maps of an image"
    source: ClassVar[str] = "Bhatt et al. 2020"
    together: ClassVar[tuple[str, ...]] = ("score",)
    failings: ClassVar[str] = (
        "Noisy: 20 subsets of 20 patches say little about one image. Its values differ much with the subset's size."
    )

    correlation: str = "spearman"

    def __post_init__(self) -> None:
        check_correlation(self.name, self.correlation)
        super().__post_init__()

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        subsets = plan.details["subsets"]
        summed, drop = self.both_sides(maps, subsets, readings)
        score = correlation(summed, drop, self.correlation).mean(-1)
        return score, {"drop": drop, "subsets": subsets}

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        sides = zip(self.both_sides(maps, plan.details["subsets"], readings), ("attribution", "drop"), strict=True)
        for side, what in sides:
            for c, flat in enumerate(is_flat(side).all(-1).tolist()):
                if reasons[c] is None and flat:
                    reasons[c] = f"the {what} of the subsets has a standard deviation below {FLAT:g}, in each trial"
        return reasons
