"""Some images under evaluation, and what the metrics ask of them: nothing is run twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastfg.perturb import Engine, PatchGrid, Readings, generator, make_fill
from fastfg.perturb.fills import Baseline

Answer = Callable[[], Readings]


@dataclass
class Subjects:
    """``b`` images; a view is one of them with the fill of its removed patches.

    Args:
        images: [b, C, H, W]. target: [b]. unperturbed: readings [b] of the images as they are.
        first: the place of the first one among all the images under evaluation.
    """

    images: Tensor
    target: Tensor
    keys: Sequence[str]
    unperturbed: Readings
    grid: PatchGrid
    seed: int = 0
    first: int = 0
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    asked: int = 0  # forwards that the metrics would run, each of them and each map alone
    _image: list[int] = field(default_factory=list)  # of each view
    _fills: list[Tensor] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)  # views by image and baseline
    _views: list[Tensor] = field(default_factory=list)  # of each question
    _masks: list[Tensor] = field(default_factory=list)
    _readings: Readings | None = None
    _row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # of each mask asked for

    def views(self, baseline: Baseline, image: Tensor) -> Tensor:
        """The views [n] of images [n] under a baseline, which metrics share."""
        return torch.tensor([self._view(int(i), baseline) for i in image], dtype=torch.long)

    def add_view(self, image: int, fill: Tensor) -> int:
        """A view with a fill of its own."""
        self._image.append(image)
        self._fills.append(fill)
        return len(self._fills) - 1

    def _view(self, image: int, baseline: Baseline) -> int:
        key = (image, id(baseline) if isinstance(baseline, Tensor) else baseline)
        if key not in self._known:
            random = generator(self.seed, self.keys[image], "baseline")
            fill = make_fill(
                baseline,
                self.images[image],
                self.first + image,
                self.grid,
                random,
                self.pixel_mean,
                self.pixel_std,
            )
            self._known[key] = self.add_view(image, fill)
        return self._known[key]

    def ask(self, view: Tensor, masks: Tensor) -> Answer:
        """Ask for ``masks`` [U, m, P] of the views [U]; the answer, once it is there, has readings [U, m]."""
        U, m, P = masks.shape
        start = sum(len(v) for v in self._views)
        self._views.append(view.repeat_interleave(m))
        self._masks.append(masks.reshape(U * m, P))

        def answer() -> Readings:
            assert self._readings is not None  # submit was called
            return self._readings.cpu()[self._row[start : start + U * m].reshape(U, m)]

        return answer

    def submit(self, engine: Engine) -> None:
        """Hand all that was asked for to the engine, each mask of a view once."""
        if not self._views:
            return
        view, masks = torch.cat(self._views), torch.cat(self._masks)
        packed = np.packbits(masks.numpy(), axis=1)
        known: dict[tuple[int, bytes], int] = {}
        chosen: list[int] = []  # one question for each mask that differs
        views, rows = view.tolist(), [0] * len(view)
        for question in view.argsort(stable=True).tolist():
            key = (views[question], packed[question].tobytes())
            row = known.setdefault(key, len(known))
            if row == len(chosen):
                chosen.append(question)
            rows[question] = row
        self._row = torch.tensor(rows)
        device, image = self.images.device, torch.tensor(self._image)
        self._readings = engine.submit(
            self.images[image.to(device)],
            self._fills,
            view[chosen],
            self.target[image[view[chosen]]].to(device),
            masks[chosen].to(device),
        )
        self._views, self._masks, self._fills = [], [], []  # the engine has what it needs of them
