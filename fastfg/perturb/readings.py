"""The numbers that are kept from each forward: the target's logit and probability, and the largest probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfg.targets import Target


@dataclass
class Readings:
    """Three float64 numbers per forward, as three tensors of the same shape.

    Attributes:
        logit: the target class's logit, or the value of a target without classes.
        prob: the target class's probability; the value where the target has no probability.
        max_prob: the largest probability of any class; NaN where the target has no probability.
    """

    logit: Tensor
    prob: Tensor
    max_prob: Tensor

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Readings:
        """``n`` readings, all NaN."""
        return cls(*(torch.full((n,), torch.nan, dtype=torch.float64, device=device) for _ in range(3)))

    @classmethod
    def joined(cls, parts: Sequence[Readings], device: torch.device) -> Readings:
        """One after the other; without parts, none."""
        if not parts:
            return cls.empty(0, device)
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logit", "prob", "max_prob")))

    @classmethod
    def of(cls, output: Any, n: int, target: Target) -> Readings:
        """Readings of the model's output for ``n`` images. ``target``: from :meth:`Target.of`, for these images."""
        return cls(*target.read(output, n))

    def __getitem__(self, rows: Any) -> Readings:
        return Readings(self.logit[rows], self.prob[rows], self.max_prob[rows])

    def after(self, first: Readings) -> Readings:
        """These readings [C, m] with ``first`` [C] as a new first column: [C, 1 + m]."""
        pairs = ((first.logit, self.logit), (first.prob, self.prob), (first.max_prob, self.max_prob))
        return Readings(*(torch.cat([one[:, None], many], dim=1) for one, many in pairs))

    def cpu(self) -> Readings:
        return self.on_the_way()()

    def on_the_way(self) -> Callable[[], Readings]:
        """Start the copy to the CPU, and return the function that waits for it, but not for work that starts later."""
        there = torch.stack([self.logit, self.prob, self.max_prob])
        here = there.to("cpu", non_blocking=there.is_cuda)
        copied = torch.cuda.Event() if there.is_cuda else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(there.device))

        def arrived() -> Readings:
            if copied is not None:
                copied.synchronize()
            return Readings(*here)

        return arrived
