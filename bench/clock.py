"""Measure the time and the memory of a call, on a CPU or a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

FLUSH = 2**29  # bytes written before each run: more than any cache; meanwhile the CPU launches the work
BUDGET = {"cpu": 0.5, "cuda": 1.0}  # seconds for all rounds of a benchmark
ROUNDS = (5, 200)  # minimum and maximum
LONG = 1.0  # seconds; a run that takes longer gets three rounds


class Clock:
    """A timer for pytest-benchmark, which reads it just before and just after the work.

    On a CUDA device it records events, so the time is measured on the device.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.started: torch.cuda.Event | None = None
        self.junk = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self) -> float:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self.started is None:
            self.started = event
            return 0.0
        start, self.started = self.started, None
        event.synchronize()
        return start.elapsed_time(event) / 1e3

    def flush(self) -> None:
        """Empty the device's cache. The device is busy with that while the CPU launches the work."""
        if self.junk is not None:
            torch.cuda.synchronize()
            self.junk.zero_()

    def seconds(self, run: Callable[[], Any]) -> float:
        """The time of one run."""
        self.flush()
        start = self()
        run()
        return self() - start

    def rounds(self, run: Callable[[], Any]) -> int:
        """How many runs fit the budget, estimated from one run."""
        once = self.seconds(run)
        least, most = ROUNDS
        return 3 if once > LONG else max(least, min(most, int(BUDGET[self.device] / max(once, 1e-9))))


class StandIn:
    """Replaces pytest-benchmark's fixture if it is not installed."""

    disabled = False

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stats: Any = None

    def pedantic(self, run: Callable[[], Any], setup: Callable[[], None], rounds: int) -> None:
        data = []
        for _ in range(rounds):
            setup()
            start = self.clock()
            run()
            data.append(self.clock() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def peak(run: Callable[[], Any], device: str) -> int:
    """The peak memory of ``run`` in bytes, above what was allocated before it.

    On a CPU this adds up the allocator's events, which takes longer than the run itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
