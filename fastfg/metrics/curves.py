"""What the curve metrics share: the most important patches removed first (MIF), or the least important first (LIF).

LIF is the exact reverse of MIF: patches with the same attribution are removed by index in MIF, and restored by index
along the insertion curve, which is the LIF curve read backwards. Both curves have the same shares ``x`` on their axis,
from 0 (no patch is removed) to 1 (all are), so they are compared and integrated at the same points, also where the
last step is smaller than the others.

With ``baseline="removed"``, a model without a class token has no reading for the image without patches. Its curves end
one step earlier. An area is divided by the length of its axis, so it is the mean height of the curve in both cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan, as_float64, check_integer, descending
from fastfg.perturb import Readings

NO_SCALE = "the reading without any patch is missing or not below that of the image, so the curve can't be normalised"
SAME = 1e-6  # end points that differ by less than this share of the largest reading are the same


def mean_height(x: Tensor, curve: Tensor) -> Tensor:
    """The area under ``curve`` [..., n] over ``x`` [..., n] by the trapezoid rule, per unit of ``x``: [...], float64.

    >>> import torch
    >>> float(mean_height(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0])))
    0.5
    """
    x, curve = as_float64(x), as_float64(curve)
    return torch.trapezoid(curve, x, dim=-1) / (x[..., -1] - x[..., 0])


def normalised(curve: Tensor) -> Tensor:
    """``(curve - f(all)) / (f(none) - f(all))`` [..., n]: from 1 to 0.

    NaN where ``f(none)`` is not above ``f(all)``: scaled by a negative number, low and high would change places.
    """
    first, last = curve[..., :1], curve[..., -1:]
    span = first - last
    none = span <= SAME * curve.abs().amax(-1, keepdim=True)
    return torch.where(none, torch.nan, (curve - last) / torch.where(none, 1.0, span))


def removal_masks(order: Tensor, step: int) -> Tensor:
    """Masks [C, m, P] after each step along ``order`` [C, P], ``step`` patches at a time, until all are removed."""
    P = order.shape[1]
    removed = torch.arange(step, P + step, step, device="cpu")
    return order.argsort(dim=-1)[:, None, :] < removed[:, None]


def shares(masks: Tensor) -> Tensor:
    """The share of removed patches for the image as it is, then under each mask [C, m, P]: [C, 1 + m], float64."""
    counted = masks.sum(-1).double() / masks.shape[-1]
    return torch.cat([counted.new_zeros(len(counted), 1), counted], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class CurveMetric(Metric):
    """Base class of the metrics of one curve.

    Args:
        patches_per_step: how many patches each step removes.
    """

    patches_per_step: int = 1

    def __post_init__(self) -> None:
        check_integer(self.name, "patches_per_step", self.patches_per_step, 1)

    def reading(self, readings: Readings) -> Tensor:
        return readings.prob

    def _along(self, order: Tensor) -> Plan:
        """The masks along ``order`` [C, P]."""
        self._check_steps(order.shape[1])
        masks = removal_masks(order, self.patches_per_step)
        return Plan(masks, order=order, patches_per_step=self.patches_per_step)

    def _check_steps(self, P: int) -> None:
        """Raise ValueError where the first step removes all patches: the curve would be the same for every map."""
        if self.patches_per_step >= P:
            expected = f"expected patches_per_step from 1 to {P - 1}, as there are {P} patches"
            raise ValueError(f"{self.name}: {expected}, got {self.patches_per_step}")


@dataclass(frozen=True, kw_only=True, eq=False)
class AreaMetric(CurveMetric):
    """Base class of the areas under one curve.

    Args:
        patches_per_step: how many patches each step removes.
        normalised: whether the score is the area under the curve that is scaled to 1 with all patches and to 0
            without any. An image whose reading does not fall from the one to the other then has no score.
    """

    normalised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.normalised, bool):
            raise TypeError(f"{self.name}: expected normalised to be True or False, got {self.normalised!r}")

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        x, curve = shares(plan.masks), readings.prob
        raw, scaled = mean_height(x, curve), mean_height(x, self._normalised(plan, readings))
        details = {"x": x, "curve": curve, "raw": raw, "normalised": scaled}
        return scaled if self.normalised else raw, details

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        if not self.normalised:
            return reasons
        undefined = self._normalised(plan, readings).isnan().all(1).tolist()
        return [reason or (NO_SCALE if none else None) for reason, none in zip(reasons, undefined, strict=True)]

    @staticmethod
    def _normalised(plan: Plan, readings: Readings) -> Tensor:
        """The normalised curve [C, n]; NaN where the curve does not end without any patch."""
        ends = plan.masks[:, -1:].all(-1)  # [C, 1]
        return torch.where(ends, normalised(readings.prob), torch.nan)


def check_parts(metric: str, name: str, given: Any) -> tuple[float, ...]:
    """``given`` parts of the patches, one or several, as floats. Raises ValueError unless each is between 0 and 1."""
    parts = list(given) if isinstance(given, Iterable) else [given]
    if not parts or not all(isinstance(part, (int, float)) and part is not True and 0 < part < 1 for part in parts):
        raise ValueError(f"{metric}: expected {name} between 0 and 1, one or several, got {given!r}")
    return tuple(float(part) for part in parts)


def patches_of(parts: Sequence[float], P: int) -> Tensor:
    """The numbers of patches [n] nearest to ``parts`` of ``P`` patches, from one patch to all but one."""
    return torch.tensor([min(max(round(part * P), 1), P - 1) for part in parts], device="cpu")


def most_important_first(maps: Tensor) -> Tensor:
    """The order [C, P] of MIF: by attribution, largest first, ties by patch index."""
    return descending(maps)


def least_important_first(maps: Tensor) -> Tensor:
    """The order [C, P] of LIF: MIF reversed."""
    return descending(maps).flip(-1)
