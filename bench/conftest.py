"""The options ``--size``, ``--save`` and ``--results``, the suites' cases as parameters, and the ``bench`` fixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.clock import Clock, StandIn
from bench.results import RESULTS
from bench.runner import Benchmark, Session

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmarks of fastfg")
    group.addoption("--size", choices=("small", "full"), help="default: small on a CPU, full on a CUDA device")
    group.addoption("--save", action="store_true", help=f"append the results to {RESULTS.name}/<device>/")
    group.addoption("--results", type=Path, metavar="DIR", help="append the results to DIR/<device>/")


def pytest_configure(config: pytest.Config) -> None:
    root = config.getoption("--results") or (RESULTS if config.getoption("--save") else None)
    config.stash[SESSION] = Session(DEVICE, root)
    asked = [argument for argument in config.invocation_params.args if str(argument).startswith("--benchmark-")]
    if config.pluginmanager.hasplugin("benchmark") and not asked:  # one table per case, with the columns that matter
        config.option.benchmark_group_by = "func,param:case"
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        suite = metafunc.module.SUITE
        size = metafunc.config.getoption("--size") or ("full" if DEVICE == "cuda" else "small")
        both = [(case, provider) for case in getattr(suite, size) for provider in suite.providers]
        metafunc.parametrize(("case", "provider"), both, ids=[f"{case}-{provider}" for case, provider in both])


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``bench(suite, case, provider)`` checks one provider, measures it and writes the result."""
    clock = Clock(DEVICE)

    def fixture() -> object:
        if not request.config.pluginmanager.hasplugin("benchmark"):
            return StandIn(clock)
        request.node.add_marker(pytest.mark.benchmark(timer=clock))
        return request.getfixturevalue("benchmark")  # requested late: pytest-benchmark warns about an unused fixture

    return lambda *what: Benchmark(request.config.stash[SESSION], *what, clock, fixture)()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for file, lines in config.stash[SESSION].written.items():
        terminalreporter.write_line(f"{lines} lines written to {file}")
