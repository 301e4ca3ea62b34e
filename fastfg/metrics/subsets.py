"""What the metrics of random subsets share: the subsets, their masks, and both sides of the comparison.

They draw the same subsets, so that an image's masks are run once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan, check_integer
from fastfg.perturb import PatchGrid, Readings

TIE = 2.0**-40  # sums that agree to this share of the largest are equal


@dataclass(frozen=True, kw_only=True, eq=False)
class SubsetMetric(Metric):
    """Base class of the metrics that remove random subsets of ``subset_size`` patches.

    Args:
        n_runs: subsets per trial. n_trials: the trials.
        subset_size: patches per subset; None is 20 where P >= 100, else ``max(2, round(P / 5))``.
        subsets: [n_trials, n_runs, B, subset_size] patch indices to use instead of random subsets.
    """

    n_runs: int = 20
    n_trials: int = 3
    subset_size: int | None = None
    subsets: Tensor | None = None

    def __post_init__(self) -> None:
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

    @property
    def purpose(self) -> str:
        return "faithfulness_correlation"  # the name under which all of these metrics draw

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        C, P = maps.shape
        subsets = self._drawn(P, random) if self.subsets is None else self._given(P)  # [n_trials, n_runs, size]
        n_trials, n_runs, _ = subsets.shape
        masks = torch.zeros(n_trials * n_runs, P, dtype=torch.bool, device="cpu")
        masks.scatter_(1, subsets.flatten(0, 1), True)
        details = {"subsets": subsets.expand(C, -1, -1, -1)}
        return Plan(masks.expand(C, -1, -1), details=details, n_unperturbed=n_trials)

    def reading(self, readings: Readings) -> Tensor:
        return readings.logit

    def per_image(self) -> dict[str, int]:
        return super().per_image() | ({} if self.subsets is None else {"subsets": 2})

    def both_sides(self, maps: Tensor, subsets: Tensor, readings: Readings) -> tuple[Tensor, Tensor]:
        """Summed attribution and drop of the logit per subset, both [C, n_trials, n_runs]."""
        n_trials, n_runs = subsets.shape[1:3]
        summed = without_rounding(maps.gather(1, subsets.flatten(1)).reshape(*subsets.shape).sort(-1).values.sum(-1))
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
        found = self.subsets[:, :, 0]
        if bool((found.sort(-1).values.diff(dim=-1) == 0).any()):
            raise ValueError(f"{self.name}: expected subsets of different patches, got one with the same patch twice")
        return found


def without_rounding(summed: Tensor) -> Tensor:
    """Sums [..., n] that differ by rounding alone, made equal: they are ties, in whatever order a subset was drawn."""
    unit = summed.abs().amax(-1, keepdim=True) * TIE
    return torch.where(unit > 0, (summed / torch.where(unit > 0, unit, 1.0)).round() * unit, summed)


def default_subset_size(n_patches: int) -> int:
    """Patches per subset: 20, or a fifth of the patches of a small grid; never all patches."""
    return 20 if n_patches >= 100 else max(1, min(max(2, round(n_patches / 5)), n_patches - 1))


def draw_subsets(n_patches: int, n_trials: int, n_runs: int, size: int, random: torch.Generator) -> Tensor:
    """Subsets [n_trials, n_runs, size] of patches, each drawn without replacement. A larger size extends them."""
    chance = torch.rand(n_trials, n_runs, n_patches, generator=random, dtype=torch.float64, device="cpu")
    return chance.argsort(dim=-1, stable=True)[..., :size]
