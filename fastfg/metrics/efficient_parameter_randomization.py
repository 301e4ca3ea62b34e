"""Efficient MPRT (Hedström et al. 2024): is the map of a model with random parameters more complex?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject
from fastfg.metrics.metric import as_float64, check_integer


def histogram_entropy(maps: Any, n_bins: int = 100) -> Tensor:
    """Entropy in nats of the histogram of ``maps`` [..., P] over their own range, with ``n_bins`` equal bins: [...].

    It is NaN where a map is not finite.

    >>> import torch
    >>> histogram_entropy(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])).exp().round()
    tensor([2., 4.], dtype=torch.float64)
    """
    maps = as_float64(maps)
    rows = maps.detach().cpu().reshape(-1, maps.shape[-1]).numpy()
    entropies = [_entropy(np.histogram(row, bins=n_bins)[0]) if np.isfinite(row).all() else np.nan for row in rows]
    return torch.tensor(entropies, dtype=torch.float64, device="cpu").reshape(maps.shape[:-1])


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class EfficientParameterRandomization(ExplanationMetric):
    """The relative rise of the map's entropy when all parameters of the model are re-drawn.

    ``(H(map of the re-drawn model) - H(map)) / H(map)``, with the entropy of the histogram of the map's values. The
    re-drawn model is the last one of :class:`fastfg.metrics.ParameterRandomization`; both share its maps.

    Details: ``entropy`` [2], of the map and of the re-drawn model's.

    Args:
        n_bins: bins of the histogram; 100 is Quantus's default.
    """

    name: ClassVar[str] = "efficient_parameter_randomization"
    title: ClassVar[str] = "Efficient Parameter Randomisation"
    short: ClassVar[str] = "eMPRT"
    higher_is_better: ClassVar[bool] = True
    value_range: ClassVar[str] = "-1 to infinity"
    cost: ClassVar[str] = "no forwards; 1 attribution per image, shared with parameter_randomization"
    source: ClassVar[str] = "Hedström et al. 2024, arXiv 2401.06465"
    failings: ClassVar[str] = (
        "It compares complexity alone: another map that is as complex scores 0. With few patches the histogram is "
        "coarse: all values in different bins is the largest entropy, log P."
    )
    redraws: ClassVar[bool] = True

    n_bins: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.name, "n_bins", self.n_bins, 2)

    def changes(self, subject: Subject, random: torch.Generator) -> list[Change]:
        return [Change(redrawn=frozenset(range(len(subject.parts))))]

    def compare(self, maps: Tensor, again: Tensor, changes: Sequence[Change]) -> tuple[Tensor, dict[str, Tensor]]:
        entropy = torch.stack([histogram_entropy(maps, self.n_bins), histogram_entropy(again[:, 0], self.n_bins)], 1)
        return (entropy[:, 1] - entropy[:, 0]) / entropy[:, 0], {"entropy": entropy}
