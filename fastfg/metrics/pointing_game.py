"""The pointing game (Zhang et al. 2018): does the patch with the largest attribution lie on the object?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastfg.metrics.localisation import Localisation
from fastfg.metrics.metric import descending


@dataclass(frozen=True, kw_only=True, eq=False)
class PointingGame(Localisation):
    """1 where the patch with the largest attribution is inside the mask, else 0; the mean over images is the accuracy.

    Ties go to the lowest patch index. Quantus counts a hit where any of the tied maxima is inside. The published game
    also accepts a maximum within 15 pixels of the object, which is about one patch; that is left out here. Negative
    attributions are compared like all others.

    Details: ``patch``, the index of the patch with the largest attribution.

    Source: Zhang, Bargal, Lin, Brandt, Shen and Sclaroff, "Top-Down Neural Attention by Excitation Backprop",
    IJCV 2018.

    >>> import torch, fastfg
    >>> images, maps = torch.rand(1, 3, 4, 4), torch.tensor([[[0.1, 0.7], [0.4, 0.2]]])
    >>> masks = torch.zeros(1, 4, 4)
    >>> masks[0, :2, 2:] = 1  # the patch at the upper right
    >>> model = lambda images: images.mean((2, 3))
    >>> scores = fastfg.evaluate(model, images, maps, target=0, metrics=["pointing_game", "iou"], masks=masks)
    >>> float(scores["pointing_game"]), float(scores["iou"])  # 0.7 and 0.4 are above the mean
    (1.0, 0.5)
    """

    name: ClassVar[str] = "pointing_game"
    title: ClassVar[str] = "Pointing Game"
    short: ClassVar[str] = "PG"
    value_range: ClassVar[str] = "0 or 1"
    source: ClassVar[str] = "Zhang et al. 2018"
    failings: ClassVar[str] = "sees one patch; large objects are hit by chance (a random map scores the object's area)"

    def compare(self, maps: Tensor, inside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        best = descending(maps)[:, 0]
        return inside[best].double(), {"patch": best}
