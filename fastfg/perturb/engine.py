"""Run perturbed images in full batches, whatever mix of images, metrics and attributions they come from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfg.perturb.forward_path import ForwardPath
from fastfg.perturb.readings import Readings

VIEWS_AT_ONCE = 8  # views prepared in one go: what is prepared of them is in memory together

log = logging.getLogger("fastfg")


@dataclass
class Pending:
    """Masks of some views, waiting for their forwards."""

    images: Tensor  # [V, C, H, W]
    fills: list[Tensor]  # V of them, each broadcasts against [C, H, W]
    view: Tensor  # [n], ascending
    target: Tensor  # [n]
    masks: Tensor  # [n, P] bool
    readings: Readings  # [n], filled in as the forwards are run
    done: int = 0  # rows already run
    prepared: Any = field(default=None, repr=False)


class Engine:
    """Collects masks and runs them ``batch_size`` at a time.

    A batch that does not fit into the device's memory is run again in halves, and so are all after it.

    Args:
        path: how perturbed images reach the model. batch_size: perturbed images a forward.
    """

    def __init__(self, path: ForwardPath, batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size
        self.forwards = 0  # forwards run, an image each
        self._jobs: list[Pending] = []
        self._waiting = 0

    def logits(self, images: Tensor) -> Tensor:
        """Logits of whole images, in batches."""
        parts: list[Tensor] = []
        start = 0
        while start < len(images) or not parts:
            part = images[start : start + self.batch_size]
            try:
                parts.append(self.path.whole(part))
            except torch.OutOfMemoryError as error:
                self._halve(len(part), error)
                continue
            start += len(part)
        self.forwards += len(images)
        return torch.cat(parts)

    def submit(self, images: Tensor, fills: list[Tensor], view: Tensor, target: Tensor, masks: Tensor) -> Readings:
        """Ask for the views ``images`` [V, C, H, W] with ``fills``, each under its masks; full batches run at once.

        Args:
            view: [n], the view of each mask, ascending. target: [n], its class. masks: [n, P] bool.

        Returns readings [n], on the images' device, complete after :meth:`flush`.
        """
        readings = Readings.empty(len(masks), images.device)
        for first in range(0, len(fills), VIEWS_AT_ONCE):
            stop = min(first + VIEWS_AT_ONCE, len(fills))
            low, high = torch.searchsorted(view, torch.tensor([first, stop], device=view.device)).tolist()
            if low == high:
                continue
            rows = slice(low, high)
            part = Pending(
                images[first:stop], fills[first:stop], view[rows] - first, target[rows], masks[rows], readings[rows]
            )
            self._jobs.append(part)
            self._waiting += high - low
            while self._waiting >= self.batch_size:
                self._run_batch()
        return readings

    def flush(self) -> None:
        """Run what is still waiting."""
        while self._waiting:
            self._run_batch()

    def _run_batch(self) -> None:
        taken = self._take()
        n = sum(rows.stop - rows.start for _, rows in taken)
        try:
            target = torch.cat([job.target[rows] for job, rows in taken])
            read = Readings.of(self.path.run(self._place(taken, n)), target)
        except torch.OutOfMemoryError as error:
            self._halve(n, error)
            return
        start = 0
        for job, rows in taken:
            stop = start + rows.stop - rows.start
            job.readings.put(rows, read[slice(start, stop)])
            start, job.done = stop, rows.stop
        self._jobs = [job for job in self._jobs if job.done < len(job.masks)]
        self._waiting -= n
        self.forwards += n

    def _take(self) -> list[tuple[Pending, slice]]:
        """The rows of the next batch; nothing is counted as done before it is."""
        taken, room = [], self.batch_size
        for job in self._jobs:
            rows = slice(job.done, min(job.done + room, len(job.masks)))
            taken.append((job, rows))
            room -= rows.stop - rows.start
            if not room:
                break
        return taken

    def _place(self, taken: list[tuple[Pending, slice]], n: int) -> tuple[Tensor, ...]:
        """The batch's perturbed inputs."""
        inputs: tuple[Tensor, ...] | None = None
        start = 0
        for job, rows in taken:
            if job.prepared is None:
                job.prepared = self.path.prepare(job.images, job.fills)
            if inputs is None:
                inputs = self.path.buffers(job.prepared, n)
            views, counts = job.view[rows].unique_consecutive(return_counts=True)
            row = rows.start
            for view, count in zip(views.tolist(), counts.tolist(), strict=True):
                out = tuple(t[start : start + count] for t in inputs)
                self.path.place(job.prepared, view, job.masks[row : row + count], out)
                start, row = start + count, row + count
        assert inputs is not None  # a batch has rows
        return inputs

    def _halve(self, n: int, error: torch.OutOfMemoryError) -> None:
        """After ``n`` images did not fit; raises the device's own error where one alone does not."""
        if n == 1:
            raise error
        self.batch_size = n // 2
        torch.cuda.empty_cache()
        log.warning("%d perturbed images did not fit into memory: going on with %d", n, self.batch_size)
