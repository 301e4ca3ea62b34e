"""The perturbation engine: runs the model on masked images in full batches, and returns readings of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastfg.perturb.batches import Batches, to_device
from fastfg.perturb.forward_path import ForwardPath, Paths
from fastfg.perturb.readings import Readings
from fastfg.perturb.views import KINDS, View
from fastfg.targets import Target

VIEWS_AT_ONCE = 8  # views prepared together: all their states are in memory at once


class Engine:
    """Runs a model under many masks. One batch may mix masks of several images, metrics and maps.

    Args:
        paths: how perturbed images reach the model, per kind of view; a single path is that of filled views.
        batches: how many of them per forward.

    Attributes:
        forwards: the number of images that the model has processed.
    """

    def __init__(self, paths: Paths | ForwardPath, batches: Batches) -> None:
        self.paths = paths if isinstance(paths, Paths) else Paths(paths)
        self.path, self.batches = self.paths.filled, batches
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
        """Readings [n] of ``views`` with patches removed, in the order of ``masks``. Waits for no work of a GPU.

        Args:
            view: [n] int64, the view of each mask, ascending. masks: [n, P] bool, True: removed. Both on the CPU.
            target: of the ``n`` masks, see :meth:`fastfg.Target.of`.
            progress: called with a number of masks, counted from the first, that have all been read.
        """
        device = views[0].image.device if views else masks.device
        parts = _parts(self.paths, views, view.numpy(), masks.numpy())
        masks = to_device(masks, device)
        unread = [int(part.rows[0]) for part in parts]  # the first mask of each part that is not read
        found: list[Readings] = []
        for number, part in enumerate(parts):
            rows, place = (to_device(torch.from_numpy(numbers), device) for numbers in (part.rows, part.place))
            given = _Given(place, masks[rows], target[rows])

            def work(batch: slice, part: _Part = part, given: _Given = given, number: int = number) -> None:
                found.append(self._read_batch(part, given, batch))
                self.forwards += batch.stop - batch.start
                unread[number] = int(part.rows[batch.stop]) if batch.stop < len(part.rows) else len(masks)
                if progress is not None:
                    progress(min(unread))

            self.batches.run(len(part.rows), work, part.share)
        order = np.concatenate([part.rows for part in parts]) if parts else np.empty(0, np.int64)
        return Readings.joined(found, device)[to_device(torch.from_numpy(order.argsort()), device)]

    def _read_batch(self, part: _Part, given: _Given, batch: slice) -> Readings:
        """The readings of one batch. Nothing here waits for the device."""
        part.prepared.at_once = min(VIEWS_AT_ONCE, self.batches.size)
        states, start = part.prepared.of(int(part.place[batch.start]), int(part.place[batch.stop - 1]))
        inputs = part.path.inputs(states, given.place[batch] - start, given.masks[batch], part.left)
        return Readings.of(part.path.run(inputs), batch.stop - batch.start, given.target[batch])


class _Part(NamedTuple):
    """Masks that may share a batch: of one kind of view and, where tokens leave, of one number of patches left.

    ``rows`` are their places among all masks, and ``place`` that of each one's view among the prepared views. ``share``
    is the memory of one of their perturbed images, relative to one with all its patches. ``left`` is the number of
    patches that are left, where tokens leave.
    """

    path: ForwardPath
    prepared: _Prepared
    rows: np.ndarray
    place: np.ndarray
    share: float = 1.0
    left: int | None = None


class _Given(NamedTuple):
    """The rows of one part, on the device: the place of each mask's view, the masks and the targets."""

    place: Tensor
    masks: Tensor
    target: Target


def _parts(paths: Paths, views: Sequence[View], view: np.ndarray, masks: np.ndarray) -> list[_Part]:
    """The masks in parts, each ordered by view. Those with the most patches left come first."""
    kinds = [one.kind for one in views]
    P = masks.shape[1]
    parts = []
    for kind in KINDS:
        own = np.array([one == kind for one in kinds], dtype=bool)
        rows = own[view].nonzero()[0]
        if not len(rows):
            continue
        path = getattr(paths, kind)
        assert path is not None  # choose_path
        prepared = _Prepared(path, [one for one in views if one.kind == kind], keeps=kind == "removed")
        place = (own.cumsum() - 1)[view]
        if kind != "removed":
            parts.append(_Part(path, prepared, rows, place[rows]))
            continue
        removed = masks.sum(1)
        for n in np.unique(removed[rows]).tolist():
            alike = rows[removed[rows] == n]
            parts.append(_Part(path, prepared, alike, place[alike], (P - n + 1) / (P + 1), P - n))
    return parts


class _Prepared:
    """The states that are computed once per view of one kind, in groups of views.

    Args:
        keeps: whether the states are kept, as those of removed views, which serve each number of patches again. Else
            they are freed when no later batch needs them.
    """

    def __init__(self, path: ForwardPath, views: Sequence[View], keeps: bool) -> None:
        self.path, self.views, self.keeps = path, views, keeps
        self.at_once = VIEWS_AT_ONCE
        self._states: list[Any] = []  # of the views from _start to _stop
        self._start = self._stop = 0

    def of(self, first: int, last: int) -> tuple[list[Any], int]:
        """The states of the views from ``first`` (or earlier) to ``last``, and the place of the first one."""
        if not self.keeps:
            self._forget_before(first)
        while self._stop <= last:
            group = self.views[self._stop : self._stop + self.at_once]
            states = self.path.prepare(torch.stack([one.image for one in group]), [one.fill for one in group])
            self._states = (
                [_joined(*pair) for pair in zip(self._states, states, strict=True)] if self._states else states
            )
            self._stop += len(group)
        return self._states, self._start

    def _forget_before(self, first: int) -> None:
        if first >= self._stop:
            self._states, self._stop = [], first
        elif first > self._start:
            self._states = [states[first - self._start :] for states in self._states]
        self._start = max(self._start, first)


def _joined(some: Any, others: Any) -> Any:
    """Tensors [V, ...] or lists of views, one after the other."""
    return torch.cat([some, others]) if isinstance(some, Tensor) else [*some, *others]
