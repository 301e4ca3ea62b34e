"""``pytest -p tests.reporter`` sends every report to the run that started this process (see ``subprocesses.py``).

A report is one line of JSON, in the form that pytest itself uses to pass reports between processes. It is written to
the file that ``FASTFG_REPORTS`` names.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(config))


class Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.file = open(os.environ["FASTFG_REPORTS"], "a", encoding="utf-8", buffering=1)  # noqa: PTH123, SIM115

    def send(self, **event: Any) -> None:
        self.file.write(json.dumps(event) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.send(collected=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.send(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.send(report=self.config.hook.pytest_report_to_serializable(config=self.config, report=report))
