"""The base class of metrics that explain again: ``changes`` says under which changes, ``compare`` gives the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastfg.metrics.faithfulness_correlation import KINDS, correlation
from fastfg.metrics.metric import Metric
from fastfg.metrics.planning import unusable


class Change(NamedTuple):
    """What is changed before an image is explained again. The map under a change is the mean over its ``noises``.

    Attributes:
        redrawn: the parts of the model that are re-drawn, as positions in :attr:`Subject.parts`.
        noises: the numbers of the noises that are added to the image, each drawn once; None adds no noise.
        target: the class that is explained; None: the target itself.
    """

    redrawn: frozenset[int] = frozenset()
    noises: tuple[int | None, ...] = (None,)
    target: int | None = None


class Subject(NamedTuple):
    """What a metric may know of one image.

    Attributes:
        target: the explained class; None if the target is not a class.
        n_classes: the number of classes; None if the target is not a class.
        parts: names of the parts of the model from the output to the input; empty unless the metric re-draws them.
    """

    target: int | None
    n_classes: int | None
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplanationMetric(Metric):
    """Base class of the metrics that judge the function that made the maps: it explains each image again.

    They need ``evaluate(..., explain=)`` and remove no patches. A subclass sets the class variables of
    :class:`fastfg.metrics.Metric` and defines two pure functions, ``changes`` and ``compare``.
    """

    redraws: ClassVar[bool] = False  # whether changes re-draw parts of the model
    needs_classes: ClassVar[bool] = False  # whether the target must be a class

    def __post_init__(self) -> None:
        if self.baseline is not None:
            raise ValueError(f"{self.name}: expected no baseline, as no patch is removed, got {self.baseline!r}")

    def changes(self, subject: Subject, random: torch.Generator) -> list[Change]:
        """The changes under which one image is explained again, as many for each image.

        ``random`` is a CPU generator that depends only on the seed, the image's key and the metric's name.
        """
        raise NotImplementedError

    def noisy(self, image: Tensor, random: torch.Generator) -> Tensor:
        """``image`` [C, H, W] under one noise. ``random`` depends on the noise's number, too."""
        raise NotImplementedError

    def compare(self, maps: Tensor, again: Tensor, changes: Sequence[Change]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [C] and details {name: [C, ...]} of one image.

        ``maps`` [C, P] are the given maps, and ``again`` [C, m, P] those under the ``m`` changes; float64.
        """
        raise NotImplementedError

    def undefined(self, again: Tensor, changes: Sequence[Change], subject: Subject) -> list[str | None]:
        """Per map, why its score has no meaning, or None."""
        reasons: list[str | None] = []
        for rows in again:
            found = zip(unusable(rows), changes, strict=True)
            reasons.append(next((f"{why} {under(change, subject)}" for why, change in found if why is not None), None))
        return reasons


def under(change: Change, subject: Subject) -> str:
    """How a map was made, for messages."""
    if change.redrawn:
        return f"where {len(change.redrawn)} of {len(subject.parts)} parts of the model are re-drawn"
    if change.target is not None:
        return f"for class {change.target}"
    return "under noise on the image"


def similarity(maps: Tensor, again: Tensor, kind: str = "spearman") -> Tensor:
    """Correlation of ``maps`` [C, P] with each of ``again`` [C, m, P] over the patches: [C, m], float64.

    Unlike :func:`fastfg.metrics.correlation`, a map may have values of any size.

    >>> import torch
    >>> similarity(torch.tensor([[1e-20, 2e-20, 3e-20]]), torch.tensor([[[5.0, 6.0, 7.0], [3.0, 2.0, 1.0]]]))
    tensor([[ 1., -1.]], dtype=torch.float64)
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    first = _scaled(maps)
    return torch.stack([correlation(first, _scaled(again[:, j]), kind) for j in range(again.shape[1])], dim=1)


def _scaled(maps: Tensor) -> Tensor:
    """``maps`` [..., P] with values up to 1."""
    largest = maps.double().abs().amax(-1, keepdim=True)
    return maps.double() / torch.where(largest > 0, largest, 1.0)
