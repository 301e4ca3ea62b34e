"""Faithfulness Correlation (Bhatt et al. 2020): does a subset's attribution predict how far the logit drops?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan, as_float64, check_integer
from fastfg.perturb import PatchGrid, Readings

KINDS = ("spearman", "pearson")
TIE = 2.0**-40  # sums that agree to this share of the largest are equal
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


@dataclass(frozen=True, kw_only=True, eq=False)
class FaithfulnessCorrelation(Metric):
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

    n_runs: int = 20
    n_trials: int = 3
    subset_size: int | None = None
    correlation: str = "spearman"
    subsets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.correlation not in KINDS:
            raise ValueError(f"{self.name}: expected correlation in {KINDS}, got {self.correlation!r}")
        check_integer(self.name, "n_runs", self.n_runs, 2)
        check_integer(self.name, "n_trials", self.n_trials, 1)
        if self.subset_size is not None:
            check_integer(self.name, "subset_size", self.subset_size, 1)
        if self.subsets is not None:
            given = torch.as_tensor(self.subsets, device="cpu")
            if given.ndim != 4 or not given.numel() or given.is_floating_point() or given.dtype == torch.bool:
                raise ValueError(
                    f"{self.name}: expected subsets [n_trials, n_runs, B, subset_size] of patch indices, got "
                    f"{given.dtype} {list(given.shape)}"
                )
            object.__setattr__(self, "subsets", given.long())

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        C, P = maps.shape
        subsets = self._drawn(P, random) if self.subsets is None else self._given(P)  # [n_trials, n_runs, size]
        n_trials, n_runs, _ = subsets.shape
        masks = torch.zeros(n_trials * n_runs, P, dtype=torch.bool, device="cpu")
        masks.scatter_(1, subsets.flatten(0, 1), True)
        details = {"subsets": subsets.expand(C, -1, -1, -1)}
        return Plan(masks.expand(C, -1, -1), details=details, n_unperturbed=n_trials)

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        subsets = plan.details["subsets"]
        summed, drop = self._both_sides(maps, subsets, readings)
        score = correlation(summed, drop, self.correlation).mean(-1)
        return score, {"drop": drop, "subsets": subsets}

    def reading(self, readings: Readings) -> Tensor:
        return readings.logit

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        sides = zip(self._both_sides(maps, plan.details["subsets"], readings), ("attribution", "drop"), strict=True)
        for side, what in sides:
            for c, flat in enumerate(is_flat(side).all(-1).tolist()):
                if reasons[c] is None and flat:
                    reasons[c] = f"the {what} of the subsets has a standard deviation below {FLAT:g}, in each trial"
        return reasons

    def per_image(self) -> dict[str, int]:
        return super().per_image() | ({} if self.subsets is None else {"subsets": 2})

    def _both_sides(self, maps: Tensor, subsets: Tensor, readings: Readings) -> tuple[Tensor, Tensor]:
        """Summed attribution and drop per subset, both [C, n_trials, n_runs]."""
        n_trials, n_runs = subsets.shape[1:3]
        summed = _without_rounding(maps.gather(1, subsets.flatten(1)).reshape(*subsets.shape).sort(-1).values.sum(-1))
        drop = readings.logit[:, :1] - readings.logit[:, 1:]
        return summed, drop.reshape(-1, n_trials, n_runs)

    def _drawn(self, P: int, random: torch.Generator) -> Tensor:
        size = default_subset_size(P) if self.subset_size is None else self.subset_size
        if not 1 <= size <= P:
            raise ValueError(f"{self.name}: expected subset_size from 1 to {P}, got {size}")
        return draw_subsets(P, self.n_trials, self.n_runs, size, random)

    def _given(self, P: int) -> Tensor:
        """The subsets of the single image that :meth:`for_images` selected."""
        assert self.subsets is not None
        self.check_images(1)
        if self.subsets.numel() and (int(self.subsets.min()) < 0 or int(self.subsets.max()) >= P):
            low, high = int(self.subsets.min()), int(self.subsets.max())
            raise ValueError(f"{self.name}: expected subsets of patches 0 to {P - 1}, got {low} to {high}")
        return self.subsets[:, :, 0]


def _without_rounding(summed: Tensor) -> Tensor:
    """Sums [..., n] that differ by rounding alone, made equal: they are ties, in whatever order a subset was drawn."""
    unit = summed.abs().amax(-1, keepdim=True) * TIE
    return torch.where(unit > 0, (summed / torch.where(unit > 0, unit, 1.0)).round() * unit, summed)


def default_subset_size(n_patches: int) -> int:
    """Patches per subset: 20, or a fifth of the patches of a small grid; never all patches."""
    return 20 if n_patches >= 100 else max(1, min(max(2, round(n_patches / 5)), n_patches - 1))


def draw_subsets(n_patches: int, n_trials: int, n_runs: int, size: int, random: torch.Generator) -> Tensor:
    """Subsets [n_trials, n_runs, size] of patches, each drawn without replacement."""
    chance = torch.rand(n_trials, n_runs, n_patches, generator=random, dtype=torch.float64, device="cpu")
    return chance.argsort(dim=-1, stable=True)[..., :size]
