"""Run work in batches, and in smaller batches if the device runs out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("fastfg")

IMAGES_ON_CPU = 16
CHECKED_ON_CPU = 8
PATCHES_ON_GPU = 256 * 196  # 256 images of 224 pixels, in patches of 16


def default_size(device: torch.device, n_patches: int) -> int:
    """The number of images per batch that keeps ``device`` busy, for images of ``n_patches`` each."""
    return max(1, PATCHES_ON_GPU // n_patches) if device.type == "cuda" else IMAGES_ON_CPU


def check_batch_size(batch_size: Any) -> None:
    """Require an integer of at least 1, or None."""
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral):
        raise TypeError(f"batch_size: expected an int or None, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")


def checked_size(device: torch.device, n_patches: int) -> int:
    """The number of images at a time whose paths are compared: each is perturbed and run several times."""
    return max(CHECKED_ON_CPU, default_size(device, n_patches) // 4) if device.type == "cuda" else CHECKED_ON_CPU


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` from the CPU on ``device``, without waiting for the work that a GPU still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Batches:
    """Runs at most ``size`` items at a time. If a batch does not fit into memory, ``size`` is halved from there on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, n: int, work: Callable[[slice], None], share: float = 1.0) -> None:
        """Call ``work`` on slices that cover ``range(n)`` in order.

        Args:
            share: the memory of one item, relative to a full one. Smaller items run in larger batches.

        Raises the device's own out-of-memory error if a single item does not fit.
        """
        start, most = 0, n
        while start < n:
            rows = slice(start, min(start + max(1, int(self.size / share)), start + most, n))
            if self._fits(work, rows):
                start = rows.stop
            else:  # the error is gone by now, and so are the tensors that its traceback held
                most = (rows.stop - rows.start) // 2
                self.size = max(1, int(most * share))
                torch.cuda.empty_cache()
                log.warning("%d images did not fit into memory: continuing with %d", rows.stop - start, most)

    def _fits(self, work: Callable[[slice], None], rows: slice) -> bool:
        try:
            work(rows)
        except torch.OutOfMemoryError:
            if rows.stop - rows.start == 1:
                raise
            return False
        return True
