"""Test suites that need their own process, with every test reported in the main run.

Triton decides on its first import whether kernels are interpreted, and the rehearsal of CUDA changes torch for the
whole process. Tests that need either can't share a process with the others. A module names them in a :class:`Suite`::

    test_interpreted = Suite([["tests/ops/test_parity.py"]], lambda config: {"TRITON_INTERPRET": "1"})

A suite is collected as one test. It runs one pytest process per share, all at the same time. Each process sends its
reports through ``tests.reporter``, and the main run logs them as its own: they are counted, named, timed, and shown
with their tracebacks. The suite's own test fails if one of its tests fails or is skipped for a reason that ``skips``
does not list. It also fails if a process crashes, runs out of time, collects nothing or loses a test.

Suites have the mark ``processes``. pytest-xdist's workers can't log tests that they did not collect, so suites run in a
pytest of their own: ``pytest -n auto -m "not processes"``, then ``pytest -m processes``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.skips import forbid

ROOT = Path(__file__).parents[1]
ENDED = (0, 1)  # pytest's exit codes of a complete run: all tests passed, some failed
MARK = "processes"
POLL = 0.1  # seconds
TAIL = 6000  # characters of a process's output to show


@dataclass(frozen=True)
class Suite:
    """Tests to run in their own processes.

    Args:
        shares: the files of each process; shares run at the same time.
        environment: variables to add to each process's environment, given the main run's config.
        options: further options of pytest.
        skips: patterns of the reasons for which a test may be skipped. Any other skip is a failure.
        timeout: seconds after which a process is killed.
    """

    shares: Sequence[Sequence[str]]
    environment: Callable[[pytest.Config], dict[str, str]]
    options: Sequence[str] = ()
    skips: Sequence[str] = ()
    timeout: float = 1200.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: starts pytest processes of its own, and reports their tests")


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: Any) -> pytest.Item | None:
    if not isinstance(obj, Suite):
        return None
    item = SuiteItem.from_parent(collector, name=name, suite=obj)
    item.add_marker(MARK)
    return item


class SuiteError(Exception):
    """What went wrong, in words that need no traceback."""


class Process:
    """One share of a suite, running."""

    def __init__(self, suite: Suite, share: Sequence[str], config: pytest.Config, folder: Path) -> None:
        self.share, self.read, self.unfinished = share, 0, b""
        self.collected: int | None = None
        self.finished: set[str] = set()
        self.last = "none was started"
        self.reports, self.output = folder / "reports", folder / "output"
        self.reports.touch()
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
        command += ["-p", "tests.reporter", *suite.options, *share]
        environment = os.environ | suite.environment(config) | {"FASTFG_REPORTS": str(self.reports)}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    def running(self) -> bool:
        return self.process.poll() is None

    def events(self) -> Iterator[dict[str, Any]]:
        """The reports that the process has sent since the last call."""
        with self.reports.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        *lines, self.unfinished = (self.unfinished + new).split(b"\n")
        yield from map(json.loads, lines)

    def stop(self) -> None:
        if self.running():
            self.process.kill()
        self.process.wait()

    def trouble(self) -> str | None:
        """Why the finished process did not complete its run, or None."""
        code = self.process.returncode
        if code not in ENDED:
            return f"pytest ended with exit code {code}; the last test started: {self.last}"
        if not self.collected:
            return "no test was collected"
        if self.collected != len(self.finished):
            return f"{self.collected} tests were collected, and {len(self.finished)} were run"
        return None

    def described(self, trouble: str) -> str:
        return f"{' '.join(self.share)}: {trouble}\n{self.output.read_text(errors='replace')[-TAIL:]}"


class SuiteItem(pytest.Item):
    """Runs a suite, and logs the report of each of its tests."""

    def __init__(self, *, suite: Suite, **options: Any) -> None:
        super().__init__(**options)
        self.suite = suite

    def runtest(self) -> None:
        if hasattr(self.config, "workerinput"):
            raise SuiteError("expected a run without pytest-xdist's workers: pytest -m processes")
        started, failed = time.monotonic(), 0
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name, str(n)) for n in range(len(self.suite.shares))]
            for folder in folders:
                folder.mkdir()
            processes = [
                Process(self.suite, share, self.config, folder)
                for share, folder in zip(self.suite.shares, folders, strict=True)
            ]
            try:
                running = True
                while running and not self.session.shouldfail and not self.session.shouldstop:
                    running = any(process.running() for process in processes)
                    failed += sum(self.log(process, event) for process in processes for event in process.events())
                    if time.monotonic() - started > self.suite.timeout:
                        raise SuiteError("\n".join(self.late(p) for p in processes if p.running()) or "out of time")
                    time.sleep(POLL * running)
            finally:
                for process in processes:
                    process.stop()
            if running:  # the main run stops here, as with --exitfirst
                return
            troubles = [(process, process.trouble()) for process in processes]
            said = [process.described(trouble) for process, trouble in troubles if trouble is not None]
        if failed:
            said.insert(0, f"{failed} of the suite's tests failed, each reported under its own name")
        if said:
            raise SuiteError("\n".join(said))

    def late(self, process: Process) -> str:
        return process.described(f"not done after {self.suite.timeout:g} s; the last test started: {process.last}")

    def log(self, process: Process, event: dict[str, Any]) -> bool:
        """Log an event's report as the main run's own. Returns whether it is a failure."""
        if "collected" in event:
            process.collected = event["collected"]
            self.session.testscollected += event["collected"]  # for the percentages
            return False
        if "started" in event:
            process.last = event["started"]
            return False
        report = self.config.hook.pytest_report_from_serializable(config=self.config, data=event["report"])
        if isinstance(report.longrepr, list):  # a skip's (file, line, reason), which JSON turned into a list
            report.longrepr = tuple(report.longrepr)
        forbid(report, self.suite.skips)
        if report.when == "teardown":
            process.finished.add(report.nodeid)
        with self.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            self.ihook.pytest_runtest_logreport(report=report)
        return report.failed

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, SuiteError) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name
