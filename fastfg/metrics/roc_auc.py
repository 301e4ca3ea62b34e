"""ROC AUC against a mask: how often does a patch on the object rank above one beside it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.localisation import Localisation
from fastfg.metrics.metric import as_float64


def area_under_roc(maps: Tensor, inside: Tensor) -> Tensor:
    """The area under the ROC curve of ``maps`` [..., P] as a score for ``inside`` [P] bool: [...], float64.

    It is the share of pairs, one patch inside and one outside, in which the one inside has the larger attribution; a
    tie counts half. NaN where no patch is inside or none is outside.

    >>> import torch
    >>> inside = torch.tensor([True, False, True, False])
    >>> float(area_under_roc(torch.tensor([3.0, 2.0, 2.0, 1.0]), inside))  # 1, 1, a tie, 1
    0.875
    """
    values = as_float64(maps).contiguous()
    ranked = values.sort(-1).values
    below, up_to = (torch.searchsorted(ranked, values, right=right) for right in (False, True))
    rank = (below + up_to + 1).double() / 2  # the average rank of ties, from 1
    n_inside = inside.sum()
    least = n_inside * (n_inside + 1) / 2
    return ((rank * inside).sum(-1) - least) / (n_inside * (inside.numel() - n_inside))


@dataclass(frozen=True, kw_only=True, eq=False)
class RocAuc(Localisation):
    """The area under the ROC curve of the attributions as a score for the patches inside the mask.

    Ties count half (average ranks). Only the order of the attributions counts, so negative ones are ranked last. A
    random map scores 0.5 for objects of every size.
    """

    name: ClassVar[str] = "roc_auc"
    title: ClassVar[str] = "ROC AUC"
    short: ClassVar[str] = "AUC"
    source: ClassVar[str] = "Fawcett 2006"
    failings: ClassVar[str] = "all patches count alike: the order far below the maximum decides for small objects"

    def compare(self, maps: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return area_under_roc(maps, inside), {}
