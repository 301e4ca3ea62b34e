"""Top-k intersection (Theiner et al. 2022): how many of the k best patches lie on the object?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.localisation import Localisation
from fastfg.metrics.metric import Plan, check_integer, descending
from fastfg.perturb import PatchGrid


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKIntersection(Localisation):
    """The part of the ``k`` patches with the largest attributions that is inside the mask.

    Ties go to the lowest patch index. Only the order of the attributions counts, so negative ones are ranked last. An
    object of fewer than ``k`` patches can't reach 1.

    Source: Theiner, Mueller-Budack and Ewerth, "Interpretable Semantic Photo Geolocation", WACV 2022.

    Args:
        k: number of patches. None is ``ceil(P / 50)``: 4 of 196, the part of an image of 224 x 224 pixels that 1000
            pixels are.
    """

    name: ClassVar[str] = "top_k_intersection"
    title: ClassVar[str] = "Top-k Intersection"
    short: ClassVar[str] = "TKI"
    source: ClassVar[str] = "Theiner et al. 2022"
    failings: ClassVar[str] = "depends on k; objects of fewer than k patches can't reach 1; large objects score higher"

    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None:
            check_integer(self.name, "k", self.k, 1)

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        if self.k is not None and self.k > grid.n_patches:
            raise ValueError(f"{self.name}: expected k from 1 to {grid.n_patches} patches, got {self.k}")
        return super().plan(maps, grid, random)

    def compare(self, maps: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        k = math.ceil(maps.shape[1] / 50) if self.k is None else self.k
        return inside[descending(maps)[:, :k]].double().mean(1), {}
