"""Relevance rank accuracy (Arras et al. 2022): how many of the K best patches lie on the object of K patches?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastfg.metrics.localisation import Localisation
from fastfg.metrics.metric import descending


@dataclass(frozen=True, kw_only=True, eq=False)
class RelevanceRank(Localisation):
    """The part of the ``K`` patches with the largest attributions that is inside the mask, which holds ``K`` patches.

    Ties go to the lowest patch index. Only the order of the attributions counts, so negative ones are ranked last.

    Details: ``n_inside``, the number ``K``.

    Source: Arras, Osman and Samek, "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network
    explanations", Information Fusion 2022.
    """

    name: ClassVar[str] = "relevance_rank"
    title: ClassVar[str] = "Relevance Rank"
    short: ClassVar[str] = "RRA"
    source: ClassVar[str] = "Arras et al. 2022"
    failings: ClassVar[str] = "large objects score higher (a random map scores the object's area)"

    def compare(self, maps: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        n_inside = inside.sum()
        best = descending(maps)[:, : int(n_inside)]
        return inside[best].double().mean(1), {"n_inside": n_inside.expand(len(maps))}
