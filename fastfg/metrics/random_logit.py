"""Random-Logit test (Sixt et al. 2020): is the map of the target that of any other class, too?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject, similarity
from fastfg.metrics.faithfulness_correlation import check_correlation
from fastfg.metrics.metric import check_integer


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomLogit(ExplanationMetric):
    """Correlation between the map of the target class and that of another class, which is drawn per image.

    Sixt et al. and Quantus compare by SSIM, whose window of 7 x 7 pixels is too large for maps of few patches. This is
    the rank correlation. The other class of a one-logit model is the negated logit.

    Details: ``correlation`` [n_classes], ``classes`` [n_classes], the drawn classes.

    Args:
        n_classes: other classes per image, drawn without replacement; the score is the mean correlation.
        correlation: ``spearman`` or ``pearson``.
    """

    name: ClassVar[str] = "random_logit"
    title: ClassVar[str] = "Random Logit"
    short: ClassVar[str] = "RL"
    higher_is_better: ClassVar[bool] = False
    value_range: ClassVar[str] = "-1 to 1"
    cost: ClassVar[str] = "no forwards; n_classes (1) attributions per image"
    source: ClassVar[str] = "Sixt et al. 2020, arXiv 1912.09818"
    failings: ClassVar[str] = (
        "A random map has a score of 0. Classes that share evidence should share their map; with an object on a plain "
        "background every class does."
    )
    needs_classes: ClassVar[bool] = True

    n_classes: int = 1
    correlation: str = "spearman"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_correlation(self.name, self.correlation)
        check_integer(self.name, "n_classes", self.n_classes, 1)

    def changes(self, subject: Subject, random: torch.Generator) -> list[Change]:
        target, n = subject.target, subject.n_classes
        assert target is not None and n is not None  # needs_classes
        if self.n_classes > n - 1:
            raise ValueError(
                f"{self.name}: expected n_classes from 1 to {n - 1}, as the model has {n} classes, got {self.n_classes}"
            )
        drawn = torch.randperm(n - 1, generator=random, device="cpu")[: self.n_classes].tolist()
        return [Change(target=other + (other >= target)) for other in drawn]

    def compare(self, maps: Tensor, again: Tensor, changes: Sequence[Change]) -> tuple[Tensor, dict[str, Tensor]]:
        found = similarity(maps, again, self.correlation)
        classes = torch.tensor([change.target for change in changes], device="cpu")
        return found.mean(1), {"correlation": found, "classes": classes.expand(len(maps), -1)}
