"""Max-Sensitivity (Yeh et al. 2019): how far does the map change under small noise on the image, at most?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject, under
from fastfg.metrics.metric import as_float64, check_integer, check_positive
from fastfg.metrics.planning import NOT_FINITE_MAP


def relative_change(maps: Any, again: Any) -> Tensor:
    """Euclidean norm of the change from ``maps`` [..., P] to ``again`` [..., P], over that of ``maps``: [...], float64.

    >>> import torch
    >>> float(relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 1.5])))
    0.5
    """
    maps, again = as_float64(maps), as_float64(again)
    if maps.shape[-1:] != again.shape[-1:] or maps.ndim == 0:
        raise ValueError(f"again: expected [..., {list(maps.shape)[-1:]}], as maps, got {list(again.shape)}")
    largest = maps.abs().amax(-1, keepdim=True)  # so that the squares of small values do not vanish
    return ((again - maps) / largest).norm(dim=-1) / (maps / largest).norm(dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaxSensitivity(ExplanationMetric):
    """The largest relative change of the map under uniform noise on the normalised image.

    ``max_j ||map(x + e_j) - map(x)|| / ||map(x)||``, with each pixel of ``e_j`` from ``[-radius, radius]``, for the
    same target. The radius is Quantus's default, and the number of samples is Captum's (Quantus takes 200, which costs
    as many attributions). The division by the norm of the map follows both, and makes methods with different units
    comparable.

    Details: ``change`` [n_samples], the relative change under each noise.

    Args:
        radius: the largest noise per pixel, in units of the model's input (after normalisation).
        n_samples: the number of noises. More samples can only raise the score.
    """

    name: ClassVar[str] = "max_sensitivity"
    title: ClassVar[str] = "Max-Sensitivity"
    short: ClassVar[str] = "MaxSens"
    higher_is_better: ClassVar[bool] = False
    value_range: ClassVar[str] = "0 to infinity"
    cost: ClassVar[str] = "no forwards; n_samples (10) attributions per image"
    source: ClassVar[str] = "Yeh et al. 2019, arXiv 1901.09392"
    failings: ClassVar[str] = (
        "A map that does not depend on the image has the best score. The score grows with radius and n_samples, and "
        "the noise is outside the data. A change of the prediction under the noise is not told apart."
    )

    radius: float = 0.2
    n_samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.name, "n_samples", self.n_samples, 1)
        check_positive(self.name, "radius", self.radius)

    def changes(self, subject: Subject, random: torch.Generator) -> list[Change]:
        return [Change(noises=(number,)) for number in range(self.n_samples)]

    def noisy(self, image: Tensor, random: torch.Generator) -> Tensor:
        noise = torch.rand(image.shape, generator=random, dtype=torch.float64, device="cpu")
        return image + (self.radius * (2 * noise - 1)).to(image)

    def compare(self, maps: Tensor, again: Tensor, changes: Sequence[Change]) -> tuple[Tensor, dict[str, Tensor]]:
        change = relative_change(maps[:, None], again)
        return change.amax(1), {"change": change}

    def undefined(self, again: Tensor, changes: Sequence[Change], subject: Subject) -> list[str | None]:
        finite = again.isfinite().flatten(1).all(1).tolist()  # a constant map is far from the given one, and no error
        return [None if ok else f"{NOT_FINITE_MAP} {under(changes[0], subject)}" for ok in finite]
