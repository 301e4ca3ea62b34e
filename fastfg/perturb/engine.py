"""The perturbation engine: runs the model on masked images in full batches, and returns readings of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfg.perturb.batches import Batches
from fastfg.perturb.forward_path import ForwardPath
from fastfg.perturb.readings import Readings
from fastfg.targets import Target

VIEWS_AT_ONCE = 8  # views prepared together: all their states are in memory at once


class View(NamedTuple):
    """An image [C, H, W], and the fill of its removed patches: a tensor that broadcasts against the image."""

    image: Tensor
    fill: Tensor


class Engine:
    """Runs a model under many masks. One batch may mix masks of several images, metrics and maps.

    Args:
        path: how perturbed images reach the model. batches: how many of them per forward.

    Attributes:
        forwards: the number of images that the model has processed.
    """

    def __init__(self, path: ForwardPath, batches: Batches) -> None:
        self.path, self.batches = path, batches
        self.forwards = 0

    def whole(self, images: Tensor, keep: Callable[[Any, slice], None]) -> None:
        """Run the unperturbed ``images`` [B, C, H, W], and pass the output of each batch to ``keep``, with its rows."""

        def work(rows: slice) -> None:
            output = self.path.whole(images[rows].clone())  # a model may change its input in place
            self.forwards += rows.stop - rows.start
            keep(output, rows)

        self.batches.run(len(images), work)

    def read(
        self,
        views: Sequence[View],
        view: Tensor,
        masks: Tensor,
        target: Target,
        progress: Callable[[int], None] | None = None,
    ) -> Readings:
        """Readings [n] of ``views`` with patches removed.

        Args:
            view: [n] int64 on the CPU, the view of each mask, ascending. masks: [n, P] bool, True: removed.
            target: of the ``n`` masks, see :meth:`fastfg.Target.of`.
            progress: called with the number of masks read so far.
        """
        readings = Readings.empty(len(masks), masks.device)
        prepared = _Prepared(self.path, views)

        def work(rows: slice) -> None:
            prepared.at_once = min(VIEWS_AT_ONCE, self.batches.size)
            output = self.path.run(self._inputs(prepared, view[rows], masks[rows]))
            readings.put(rows, Readings.of(output, rows.stop - rows.start, target[rows]))
            self.forwards += rows.stop - rows.start
            if progress is not None:
                progress(rows.stop)

        self.batches.run(len(masks), work)
        return readings

    def _inputs(self, prepared: _Prepared, view: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
        """The perturbed inputs of one batch."""
        views, counts = view.unique_consecutive(return_counts=True)
        prepared.forget_before(int(views[0]))
        inputs: tuple[Tensor, ...] | None = None
        start = 0
        for v, count in zip(views.tolist(), counts.tolist(), strict=True):
            states, place = prepared.of(v)
            if inputs is None:
                inputs = self.path.buffers(states, len(masks))
            rows = slice(start, start + count)
            self.path.place(states, place, masks[rows], tuple(t[rows] for t in inputs))
            start = rows.stop
        assert inputs is not None  # a batch has rows
        return inputs


class _Prepared:
    """The states that are computed once per view, in groups of views. They are freed when no later batch needs them."""

    def __init__(self, path: ForwardPath, views: Sequence[View]) -> None:
        self.path, self.views, self.at_once = path, views, VIEWS_AT_ONCE
        self._states: dict[int, tuple[Any, int]] = {}  # view: the states of its group, and its place among them

    def of(self, v: int) -> tuple[Any, int]:
        if v not in self._states:
            group = self.views[v : v + self.at_once]
            states = self.path.prepare(torch.stack([view.image for view in group]), [view.fill for view in group])
            for place in range(len(group)):
                self._states[v + place] = (states, place)
        return self._states[v]

    def forget_before(self, v: int) -> None:
        for old in [known for known in self._states if known < v]:
            del self._states[old]
