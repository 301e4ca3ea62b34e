"""Relevance mass accuracy (Arras et al. 2022): how much of the positive attribution lies on the object?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.localisation import EMPTY_MASK, FULL_MASK, Localisation
from fastfg.metrics.metric import Plan, as_float64
from fastfg.perturb import Readings

NO_MASS = "no patch has a positive attribution"
EVEN_MASK = "the mask takes the same share of every patch"


def mass_accuracy(maps: Tensor, share: Tensor) -> Tensor:
    """The part of the positive attribution of ``maps`` [..., P] that lies inside: [...], float64.

    ``share`` [..., P]: how much of each patch lies inside, 0 to 1. NaN where no attribution is positive.

    >>> import torch
    >>> float(mass_accuracy(torch.tensor([3.0, 1.0, -5.0]), torch.tensor([0.5, 1.0, 1.0])))  # (1.5 + 1) / 4
    0.625
    """
    positive = as_float64(maps).clamp(min=0)
    return (positive * as_float64(share)).sum(-1) / positive.sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RelevanceMass(Localisation):
    """The part of the positive attribution that lies inside the mask. Negative attributions count as 0.

    By default each patch counts by its share inside the mask. That equals the published pixel metric for a map whose
    patches are spread evenly over their pixels. With ``min_share``, patches are inside or outside.

    A map without positive attribution has no score, nor has any map where the mask takes the same share of every
    patch.

    Source: Arras, Osman and Samek, "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network
    explanations", Information Fusion 2022.

    Args:
        min_share: None: each patch counts by its share.
    """

    name: ClassVar[str] = "relevance_mass"
    title: ClassVar[str] = "Relevance Mass"
    short: ClassVar[str] = "RMA"
    source: ClassVar[str] = "Arras et al. 2022"
    failings: ClassVar[str] = "large objects score higher (an even map scores the object's area); an offset changes it"
    by_share: ClassVar[bool] = True

    min_share: float | None = None

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        return mass_accuracy(maps, self._weights(plan.details["share"])), {}

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        reasons = super().says_nothing(maps, plan, readings, eps)
        positive = (maps > 0).any(1).tolist()
        return [reason or (None if some else NO_MASS) for reason, some in zip(reasons, positive, strict=True)]

    def why_undefined(self, share: Tensor) -> str | None:
        if self.min_share is not None:
            return super().why_undefined(share)
        if not bool((share == share[0]).all()):
            return None
        return {0.0: EMPTY_MASK, 1.0: FULL_MASK}.get(float(share[0]), EVEN_MASK)

    def _weights(self, share: Tensor) -> Tensor:
        return share if self.min_share is None else self.is_inside(share).to(torch.float64)
