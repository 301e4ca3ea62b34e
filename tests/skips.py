"""``--no-unexpected-skips``: a test that is skipped for an unexpected reason fails.

``make test`` uses this option, because it installs everything that a test may need. In other environments, for example
on a GPU machine with few packages, tests skip what is missing, and the summary names each reason.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any

import pytest

EXPECTED = (  # in a complete environment
    "needs a CUDA device",
    "of the extra peers",
    "HookedViT keeps the precision of its config",
    "torch was built for GPUs: see test_gpu.py",
)
OPTION = "--no-unexpected-skips"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="fail a test that is skipped for a reason that is not expected")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if item.config.getoption(OPTION):
        forbid(report, EXPECTED)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    if collector.config.getoption(OPTION):
        forbid(report, EXPECTED)
    return report


def forbid(report: pytest.TestReport | pytest.CollectReport, expected: Sequence[str]) -> None:
    """Turn a skip into a failure if its reason matches none of the ``expected`` patterns."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    if not any(re.search(pattern, reason) for pattern in expected):
        report.outcome = "failed"
        report.longrepr = f"unexpected skip: {reason}"
