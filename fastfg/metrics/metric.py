"""What a metric is: it asks for masks of some images, and turns the readings into scores when they are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfg.metrics.subjects import Subjects
from fastfg.perturb.fills import Baseline

Outcome = tuple[Tensor, dict[str, Tensor]]  # scores [U], details by name


class Metric:
    """Base of the metrics. ``baseline`` is what removed patches are filled with."""

    name: str
    title: str  # as a table shows it
    short: str  # as a figure shows it
    higher_is_better: bool

    def __init__(self, baseline: Baseline = "mean") -> None:
        self.baseline = baseline

    def start(self, subjects: Subjects, maps: Tensor, image: Tensor) -> Callable[[], Outcome]:
        """Ask for all that is needed to judge ``maps`` [U, P], each of one of the subjects: ``image`` [U].

        Returns a function to call once the engine has run what was asked for: it gives the scores [U] and the
        details, each [U, ...].
        """
        raise NotImplementedError


def descending(maps: Tensor) -> Tensor:
    """Patches by attribution, largest first, ties by patch index: [..., P] -> [..., P] indices."""
    return maps.sort(dim=-1, descending=True, stable=True).indices


def as_float64(values: Any) -> Tensor:
    """Arrays or tensors, of any dtype, as float64."""
    return torch.as_tensor(values).to(torch.float64)
