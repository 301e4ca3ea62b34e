"""Run one benchmark: check the result, then measure time and memory, then write a line."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import results
from bench.ceilings import Ceilings, measure
from bench.clock import Clock, peak
from bench.suite import Case, Suite, cast
from fastfg.ops.dispatch import BackendError


class WrongResultError(AssertionError):
    """The result differs from the reference, so it is not timed."""


class Judge:
    """The exact result of one case, and the error that a provider may have."""

    def __init__(self, suite: Suite, case: Case, arguments: tuple[Any, ...]) -> None:
        self.suite, self.arguments = suite, arguments
        part = suite.part(arguments)
        self.exact = suite.pick(suite.exact(*cast(part, torch.float64)), arguments)
        self.limit = suite.tolerance
        if case.dtype != "float32":  # twice the error of plain torch in bfloat16
            torchs = suite.pick(suite.exact(*cast(part, torch.bfloat16)), arguments)
            self.limit = 2 * error(torchs, self.exact) + torch.finfo(torch.bfloat16).eps

    def __call__(self, name: str, result: Any) -> float:
        """The error of a provider's result. Raises WrongResultError if it is too large or NaN."""
        found = error(self.suite.pick(result, self.arguments), self.exact)
        limit = 2 * self.limit if self.suite.providers[name].bar else self.limit  # others may be less exact
        if not found <= limit:
            told = f"{self.suite.name} by {name} is wrong and was not timed: error {found:.2g} > {limit:.2g}"
            raise WrongResultError(told)
        return found


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The norm of the difference over the norm of the exact result; the largest over all outputs.

    Compared on the CPU, because some providers return their result there.
    """
    both = ((ours.double().cpu(), theirs.cpu()) for ours, theirs in zip(found, exact, strict=False))
    pairs = [(ours, theirs) for ours, theirs in both if theirs.is_floating_point()]
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


class Session:
    """State shared by the benchmarks of one run: the arguments of the last case, and the ceilings."""

    def __init__(self, device: str, root: Path | None) -> None:
        self.device, self.root = device, root
        self.case: tuple[str, str] | None = None
        self.arguments: tuple[Any, ...] = ()
        self.judge: Judge | None = None
        self._ceilings: Ceilings | None = None
        self.written: dict[Path, int] = {}

    def prepare(self, suite: Suite, case: Case) -> None:
        """Make the arguments of the case once for all its providers; they replace those of the last case."""
        if self.case == (suite.name, str(case)):
            return
        self.case, self.judge, self.arguments = None, None, ()
        self.empty()
        self.arguments = suite.arguments(case, self.device)
        self.judge = Judge(suite, case, self.arguments)
        self.empty()
        self.case = (suite.name, str(case))

    def empty(self) -> None:
        if self.device == "cuda":
            gc.collect()  # the hooks of a graph may keep it alive in a cycle
            torch.cuda.empty_cache()

    @property
    def ceilings(self) -> Ceilings:
        if self._ceilings is None:
            self._ceilings = measure(self.device)
        return self._ceilings

    def write(self, line: dict[str, Any]) -> None:
        if self.root is not None:
            file = results.append(self.root, self.device, line)
            self.written[file] = self.written.get(file, 0) + 1


@dataclass
class Benchmark:
    """One provider on one case. ``fixture`` gives pytest-benchmark's fixture, or its stand-in."""

    session: Session
    suite: Suite
    case: Case
    name: str
    clock: Clock
    fixture: Callable[[], Any]

    def __call__(self) -> None:
        """Check, measure and write. Skips with the reason if the provider cannot run, and fails if it is wrong."""
        device, provider = self.session.device, self.suite.providers[self.name]
        if (reason := provider.why_not(self.case, device)) is not None:
            pytest.skip(f"{self.name}: {reason}")
        try:
            with torch.no_grad():
                _ = self.session.ceilings  # measured first, while memory is free
                self.session.prepare(self.suite, self.case)
                line = self.line(provider.make(*self.session.arguments))
        except BackendError as refused:
            pytest.skip(f"{self.name}: {refused}")
        except WrongResultError as wrong:
            pytest.fail(str(wrong), pytrace=False)
        except torch.OutOfMemoryError:
            line = None
        if line is None:  # after the except block, because the error keeps the memory of the run alive
            self.session.empty()
            pytest.skip(f"{self.name}: out of memory")
        self.session.write(line)

    def line(self, run: Callable[[], Any]) -> dict[str, Any]:
        """The line to write. The result is checked first; a wrong one raises."""
        suite, provider, judge = self.suite, self.suite.providers[self.name], self.session.judge
        assert judge is not None
        result = run()
        found = None if provider.bar == "part" else judge(self.name, result)
        del result
        line = {
            "name": suite.name,
            "provider": self.name,
            "bar": provider.bar or None,
            "backend": provider.backend,
            "shape": dict(self.case.shape),
            "dtype": self.case.dtype,
            "error": found,
        }
        if suite.timed:
            line |= self.times(run)
        if self.session.device == "cuda" or not suite.timed:
            line["peak_bytes"] = peak(run, self.session.device)
        return line

    def times(self, run: Callable[[], Any]) -> dict[str, Any]:
        """The median and its spread, the ratio to the floor, and the ratio to the function that is run alternately."""
        suite, clock, part = self.suite, self.clock, self.suite.providers[self.name].bar
        other = suite.beside(self.case, self.session.arguments) if suite.beside is not None and not part else None
        others: list[float] = []

        def between() -> None:
            if other is not None:
                others.append(clock.seconds(other[1]))
            clock.flush()

        rounds = clock.rounds(run)
        between()
        others.clear()  # the first run is not counted
        benchmark = self.fixture()
        benchmark.pedantic(run, setup=between, rounds=rounds)
        if benchmark.disabled:
            pytest.skip("--benchmark-disable: nothing is timed")
        seconds = list(benchmark.stats.stats.data)
        found = results.times(seconds)
        if suite.work is not None and part != "part":
            floor = self.session.ceilings.floor(suite.work(self.case))
            ceilings = self.session.ceilings._asdict()
            found |= {"floor": floor, "floor_ratio": found["median"] / floor, "ceilings": ceilings}
        if other is not None:
            ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds, others, strict=True))
            found |= {"beside": other[0], "ratio": ratio}
        return found
