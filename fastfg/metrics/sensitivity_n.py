"""Sensitivity-n (Ancona et al. 2018) on patches: is the drop of the logit linear in the summed attribution?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.faithfulness_correlation import correlation, is_flat
from fastfg.metrics.metric import Plan, check_integer
from fastfg.metrics.subsets import SubsetMetric, default_subset_size, draw_subsets
from fastfg.perturb import PatchGrid, Readings


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityN(SubsetMetric):
    """Pearson correlation over random subsets of ``n`` patches between attribution and drop; higher is better.

    With several ``n``, the score is the mean of their correlations. The default ``n`` is the subset size of
    ``faithfulness_correlation``; the subsets are then the same, and their forwards are shared. Subsets of a larger
    ``n`` contain those of a smaller one.

    Details: ``n`` [n_n], ``correlation`` [n_n].

    Args:
        n: patches per subset, one number or several; None is 20 where P >= 100, else ``max(2, round(P / 5))``.
        n_runs, n_trials: ``n_runs * n_trials`` subsets are drawn for each ``n``.
    """

    name: ClassVar[str] = "sensitivity_n"
    title: ClassVar[str] = "Sensitivity-n"
    short: ClassVar[str] = "Sens-n"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to 1, about 0 for a random map"
    cost: ClassVar[str] = "0 beside faithfulness_correlation for the same n, else 60 per n, shared by all maps"
    source: ClassVar[str] = "Ancona et al. 2018"
    together: ClassVar[tuple[str, ...]] = ("score",)
    failings: ClassVar[str] = "As faithfulness_correlation. Asks for linearity, which no map has for a nonlinear model."

    n: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset_size is not None or self.subsets is not None:
            raise ValueError("sensitivity_n: expected n in place of subset_size or subsets")
        if self.n is not None:
            given = list(self.n) if isinstance(self.n, Sequence) else [self.n]
            if not given:
                raise ValueError("sensitivity_n: expected at least one n, got none")
            for n in given:
                check_integer(self.name, "n", n, 1)
            object.__setattr__(self, "n", tuple(given))

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        C, P = maps.shape
        sizes = self._sizes(P)
        if not max(sizes) <= P:
            raise ValueError(f"sensitivity_n: expected n from 1 to {P} patches, got {max(sizes)}")
        rank = draw_subsets(P, self.n_trials, self.n_runs, P, random).flatten(0, 1).argsort(-1)  # [runs, P]
        masks = torch.stack([rank < n for n in sizes]).flatten(0, 1)
        details = {"n": torch.tensor(sizes, device="cpu").expand(C, -1)}
        return Plan(masks.expand(C, -1, -1), details=details, n_unperturbed=len(sizes))

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        found = correlation(*self._per_n(maps, plan, readings), kind="pearson")
        return found.mean(1), {"n": plan.details["n"], "correlation": found}

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        sides = zip(self._per_n(maps, plan, readings), ("attribution", "drop"), strict=True)
        for side, what in sides:
            for c, flat in enumerate(is_flat(side).any(-1).tolist()):
                if reasons[c] is None and flat:
                    reasons[c] = f"the {what} is the same for all subsets of one size"
        return reasons

    def _sizes(self, n_patches: int) -> tuple[int, ...]:
        return self.n if isinstance(self.n, tuple) else (default_subset_size(n_patches),)

    def _per_n(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, Tensor]:
        """Summed attribution and drop, both [C, n_n, runs]."""
        n_n = plan.details["n"].shape[1]
        summed = (plan.masks * maps[:, None, :]).sum(-1)
        drop = readings.logit[:, :1] - readings.logit[:, 1:]
        return summed.unflatten(1, (n_n, -1)), drop.unflatten(1, (n_n, -1))
