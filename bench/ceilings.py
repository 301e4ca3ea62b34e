"""The two limits of a machine: how fast it copies memory, and how fast it multiplies matrices."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from bench.clock import Clock
from bench.suite import Work

RUNS = 7
COPY = {"cpu": 2**28, "cuda": 2**31}  # bytes, much more than the caches can hold
SIDE = {"cpu": 2048, "cuda": 8192}  # side of the matrices
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}  # the CPU ops compute in float32


class Ceilings(NamedTuple):
    bytes_per_second: float  # read and written
    flops_per_second: float

    def floor(self, work: Work) -> float:
        """The least time in seconds that the work can take."""
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


def measure(device: str) -> Ceilings:
    clock = Clock(device)

    def median(run):
        run()
        return statistics.median(clock.seconds(run) for _ in range(RUNS))

    source = torch.empty(COPY[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copying = median(lambda: target.copy_(source))
    a, b = torch.randn(2, SIDE[device], SIDE[device], device=device, dtype=DTYPE[device])
    out = torch.empty_like(a)
    multiplying = median(lambda: torch.mm(a, b, out=out))
    return Ceilings(2 * COPY[device] / copying, 2 * SIDE[device] ** 3 / multiplying)
