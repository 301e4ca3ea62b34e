"""The perturbation engine: runs the model on masked images in full batches, and returns readings of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfg.perturb.batches import Batches
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
        """Readings [n] of ``views`` with patches removed, in the order of ``masks``.

        Args:
            view: [n] int64 on the CPU, the view of each mask, ascending. masks: [n, P] bool, True: removed.
            target: of the ``n`` masks, see :meth:`fastfg.Target.of`.
            progress: called with a number of masks, counted from the first, that have all been read.
        """
        readings = Readings.empty(len(masks), masks.device)
        unread = torch.ones(len(masks), dtype=torch.bool, device="cpu")

        def work(part: _Part, rows: slice) -> None:
            part.prepared.at_once = min(VIEWS_AT_ONCE, self.batches.size)
            chosen = part.rows[rows]
            where = chosen.to(masks.device)
            states, place = part.prepared.of(view[chosen])
            output = part.path.run(part.path.inputs(states, place.to(masks.device), masks[where], part.left))
            readings.put(where, Readings.of(output, len(chosen), target[where]))
            self.forwards += len(chosen)
            unread[chosen] = False
            if progress is not None:
                progress(int(unread.int().argmax()) if bool(unread.any()) else len(unread))

        for part in _parts(self.paths, views, view, masks):
            self.batches.run(len(part.rows), partial(work, part), part.share)
        return readings


class _Part(NamedTuple):
    """Masks that may share a batch: of one kind of view and, where tokens leave, of one number of patches left.

    ``rows`` are their places among all masks. ``share`` is the memory of one of their perturbed images, relative to one
    with all its patches. ``left`` is the number of patches that are left, where tokens leave.
    """

    path: ForwardPath
    prepared: _Prepared
    rows: Tensor
    share: float = 1.0
    left: int | None = None


def _parts(paths: Paths, views: Sequence[View], view: Tensor, masks: Tensor) -> Iterator[_Part]:
    """The masks in parts, each ordered by view. Those with the most patches left come first."""
    kind = torch.tensor([KINDS.index(one.kind) for one in views], dtype=torch.long, device="cpu")[view]
    P = masks.shape[1]
    for number, name in enumerate(KINDS):
        rows = (kind == number).nonzero()[:, 0]
        if not len(rows):
            continue
        path = getattr(paths, name)
        assert path is not None  # choose_path
        prepared = _Prepared(path, views, name)
        if name != "removed":
            yield _Part(path, prepared, rows)
            continue
        removed = masks.sum(1).cpu()[rows]
        for n in removed.unique().tolist():
            yield _Part(path, prepared, rows[removed == n], (P - n + 1) / (P + 1), P - n)


class _Prepared:
    """The states that are computed once per view of one kind, in groups of views.

    Those of filled and imputed views are freed when no later batch needs them. Those of removed ones serve each number
    of patches again.
    """

    def __init__(self, path: ForwardPath, views: Sequence[View], kind: str) -> None:
        self.path, self.at_once, self.keeps = path, VIEWS_AT_ONCE, kind == "removed"
        self.views = [one for one in views if one.kind == kind]
        own = torch.tensor([one.kind == kind for one in views], device="cpu")
        self._place = own.long().cumsum(0) - 1  # the place of each view among those of this kind
        self._states: list[Any] = []  # of the views from _start to _stop
        self._start = self._stop = 0

    def of(self, view: Tensor) -> tuple[list[Any], Tensor]:
        """The states for the views [n] of one batch, ascending; and the place [n] of each among them."""
        place = self._place[view]
        first, last = int(place[0]), int(place[-1])
        if not self.keeps:
            self._forget_before(first)
        while self._stop <= last:
            group = self.views[self._stop : self._stop + self.at_once]
            states = self.path.prepare(torch.stack([one.image for one in group]), [one.fill for one in group])
            self._states = (
                [_joined(*pair) for pair in zip(self._states, states, strict=True)] if self._states else states
            )
            self._stop += len(group)
        return self._states, place - self._start

    def _forget_before(self, first: int) -> None:
        if first >= self._stop:
            self._states, self._stop = [], first
        elif first > self._start:
            self._states = [states[first - self._start :] for states in self._states]
        self._start = max(self._start, first)


def _joined(some: Any, others: Any) -> Any:
    """Tensors [V, ...] or lists of views, one after the other."""
    return torch.cat([some, others]) if isinstance(some, Tensor) else [*some, *others]
