"""What is kept of each perturbed forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Readings:
    """``logit`` and ``prob`` (softmax) of the target class, ``max_prob`` of whichever class has the largest.

    float64, of one shape: one number a forward.
    """

    logit: Tensor
    prob: Tensor
    max_prob: Tensor

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Readings:
        """Room for ``n``, NaN until they are there."""
        return cls(*(torch.full((n,), torch.nan, dtype=torch.float64, device=device) for _ in range(3)))

    @classmethod
    def of(cls, logits: Tensor, target: Tensor) -> Readings:
        """From logits [n, classes] and the target class of each [n]."""
        logits = logits.double()
        prob, at = logits.softmax(-1), target.to(logits.device)[:, None]
        return cls(logits.gather(1, at)[:, 0], prob.gather(1, at)[:, 0], prob.amax(-1))

    def __getitem__(self, rows: Any) -> Readings:
        return Readings(self.logit[rows], self.prob[rows], self.max_prob[rows])

    def put(self, rows: Any, other: Readings) -> None:
        self.logit[rows], self.prob[rows], self.max_prob[rows] = other.logit, other.prob, other.max_prob

    def cpu(self) -> Readings:
        return Readings(self.logit.cpu(), self.prob.cpu(), self.max_prob.cpu())
