"""What a metric is: it asks for masks of an image, and turns the readings into scores when they are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfg.perturb import Engine, PatchGrid, Readings, generator, make_fill
from fastfg.perturb.baselines import Baseline

Outcome = tuple[Tensor, dict[str, Tensor]]  # scores [C], details by name


@dataclass
class Subject:
    """One image under evaluation."""

    engine: Engine
    image: Tensor  # [C, H, W]
    index: int  # in its batch
    key: str
    target: int
    seed: int
    unperturbed: Readings  # of this image, [1] each
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    asked: int = 0  # forwards that the metrics would run, each of them and each attribution alone

    @property
    def grid(self) -> PatchGrid:
        return self.engine.grid

    def fill(self, baseline: Baseline) -> Tensor:
        random = generator(self.seed, self.key, "baseline")
        return make_fill(baseline, self.image, self.index, self.grid, random, self.pixel_mean, self.pixel_std)

    def submit(self, masks: Tensor, fill: Tensor) -> Readings:
        """Ask the engine for this image under ``masks`` [n, P]."""
        return self.engine.submit(self.image, self.target, masks, fill)


class Metric:
    """Base of the metrics. ``baseline`` is what removed patches are filled with."""

    name: str
    title: str  # as a table shows it
    short: str  # as a figure shows it
    higher_is_better: bool

    def __init__(self, baseline: Baseline = "mean") -> None:
        self.baseline = baseline

    def start(self, subject: Subject, maps: Tensor) -> Callable[[], Outcome]:
        """Submit all that is needed to judge ``maps`` [C, P] on one image.

        Returns a function to call once the engine has been flushed: it gives the scores [C] and the details,
        each with a leading ``C``.
        """
        raise NotImplementedError


def descending(maps: Tensor) -> Tensor:
    """Patches by attribution, largest first, ties by patch index: [..., P] -> [..., P] indices."""
    return maps.sort(dim=-1, descending=True, stable=True).indices


def as_float64(values: Any) -> Tensor:
    """Arrays or tensors, of any dtype, as float64."""
    return torch.as_tensor(values).to(torch.float64)


def one_hot_masks(members: Tensor, n_patches: int) -> Tensor:
    """Masks [n, P] with the patches ``members`` [n, m] removed."""
    return torch.zeros(len(members), n_patches, dtype=torch.bool).scatter_(1, members, True)
