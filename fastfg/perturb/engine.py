"""Run perturbed images in full batches, whatever mix of images, metrics and attributions they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfg.perturb.masks import PatchGrid

Forward = Callable[[Tensor], Tensor]


@dataclass
class Readings:
    """What is kept of each perturbed forward, float64 on the CPU; filled in when the engine has run it.

    ``logit`` and ``prob`` (softmax) of the target class, ``max_prob`` of whichever class has the largest: [n].
    """

    logit: Tensor
    prob: Tensor
    max_prob: Tensor

    @classmethod
    def empty(cls, n: int) -> Readings:
        return cls(*(torch.full((n,), torch.nan, dtype=torch.float64) for _ in range(3)))

    @classmethod
    def of(cls, logits: Tensor, target: Tensor) -> Readings:
        """From logits [n, classes] and the target class of each [n]."""
        logits = logits.double()
        prob = logits.softmax(-1)
        at = target.to(logits.device)[:, None]
        return cls(logits.gather(1, at)[:, 0].cpu(), prob.gather(1, at)[:, 0].cpu(), prob.amax(-1).cpu())

    def __getitem__(self, rows: slice) -> Readings:
        return Readings(self.logit[rows], self.prob[rows], self.max_prob[rows])

    def put(self, rows: slice, other: Readings) -> None:
        self.logit[rows], self.prob[rows], self.max_prob[rows] = other.logit, other.prob, other.max_prob


@dataclass
class _Job:
    """Some masks of one image, waiting."""

    image: Tensor  # [C, H, W]
    target: int
    masks: Tensor  # [n, P] bool
    fill: Tensor  # broadcasts against [C, H, W]
    readings: Readings
    done: int = 0  # rows already run


class Engine:
    """Collects masks and runs them ``batch_size`` at a time.

    Args:
        forward: images [n, C, H, W] -> logits [n, classes].
        grid: where the patches lie. batch_size: perturbed images a forward.
    """

    def __init__(self, forward: Forward, grid: PatchGrid, batch_size: int) -> None:
        self.forward, self.grid, self.batch_size = forward, grid, batch_size
        self.run = 0  # forwards run, an image each
        self._jobs: list[_Job] = []
        self._waiting = 0

    def logits(self, images: Tensor) -> Tensor:
        """Logits of whole images, in batches."""
        parts = [self._forward(part) for part in images.split(self.batch_size)]
        return torch.cat(parts)

    def submit(self, image: Tensor, target: int, masks: Tensor, fill: Tensor) -> Readings:
        """Ask for ``image`` [C, H, W] with the patches of each mask [n, P] filled; full batches run at once.

        The readings are complete after :meth:`flush`.
        """
        readings = Readings.empty(len(masks))
        self._jobs.append(_Job(image, target, masks, fill, readings))
        self._waiting += len(masks)
        while self._waiting >= self.batch_size:
            self._run_batch()
        return readings

    def flush(self) -> None:
        """Run what is still waiting."""
        while self._waiting:
            self._run_batch()

    def _run_batch(self) -> None:
        taken: list[tuple[_Job, slice]] = []
        room = self.batch_size
        while room and self._jobs:
            job = self._jobs[0]
            rows = slice(job.done, min(job.done + room, len(job.masks)))
            taken.append((job, rows))
            job.done, room = rows.stop, room - (rows.stop - rows.start)
            if job.done == len(job.masks):
                self._jobs.pop(0)
        images = torch.cat([self._perturb(job, rows) for job, rows in taken])
        target = torch.cat([torch.full((rows.stop - rows.start,), job.target) for job, rows in taken])
        read = Readings.of(self._forward(images), target)
        start = 0
        for job, rows in taken:
            stop = start + rows.stop - rows.start
            job.readings.put(rows, read[slice(start, stop)])
            start = stop
        self._waiting -= len(images)

    def _perturb(self, job: _Job, rows: slice) -> Tensor:
        pixels = self.grid.to_pixels(job.masks[rows].to(job.image.device)).unsqueeze(1)  # [n, 1, H, W]
        return torch.where(pixels, job.fill, job.image)

    def _forward(self, images: Tensor) -> Tensor:
        logits = self.forward(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model: expected logits [{len(images)}, n] from model(images), got {got}")
        self.run += len(images)
        return logits
