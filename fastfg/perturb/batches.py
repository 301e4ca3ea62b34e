"""Run work in batches, and in smaller batches if the device runs out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger("fastfg")


class Batches:
    """Runs at most ``size`` items at a time. If a batch does not fit into memory, ``size`` is halved from there on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, n: int, work: Callable[[slice], None]) -> None:
        """Call ``work`` on slices that cover ``range(n)`` in order.

        Raises the device's own out-of-memory error if a single item does not fit.
        """
        start = 0
        while start < n:
            rows = slice(start, min(start + self.size, n))
            if self._fits(work, rows):
                start = rows.stop
            else:  # the error is gone by now, and so are the tensors that its traceback held
                self.size = (rows.stop - rows.start) // 2
                torch.cuda.empty_cache()
                log.warning("%d images did not fit into memory: continuing with %d", rows.stop - start, self.size)

    def _fits(self, work: Callable[[slice], None], rows: slice) -> bool:
        try:
            work(rows)
        except torch.OutOfMemoryError:
            if rows.stop - rows.start == 1:
                raise
            return False
        return True
