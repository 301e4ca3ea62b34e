"""A suite in processes of its own: what the main run reports of it, and what fails."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.subprocesses import ROOT

SUITE = """
from tests.subprocesses import Suite

test_them = Suite({shares!r}, lambda config: {{"WORD": "said"}}, skips=["needs a moon"], timeout={timeout})
"""
GOOD = """
import os, pytest

def test_its_environment(): assert os.environ["WORD"] == "said"

@pytest.mark.parametrize("n", [1, 2])
def test_numbers(n): assert n

@pytest.mark.xfail(reason="known", strict=True)
def test_that_is_known_to_fail(): assert False

def test_at_night(): pytest.skip("needs a moon")
"""


@pytest.fixture
def outcome(tmp_path):
    """Runs suites of files with these contents in a main run; gives its exit code and its output."""

    def run(*texts, timeout=60.0, options=("-ra",)):
        shares = []
        for number, text in enumerate(texts):
            file = tmp_path / f"share_{number}.py"
            file.write_text(text)
            shares.append([str(file)])
        (tmp_path / "test_main.py").write_text(SUITE.format(shares=shares, timeout=timeout))
        command = [sys.executable, "-m", "pytest", "-p", "tests.subprocesses", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            [*command, f"--rootdir={tmp_path}", str(tmp_path / "test_main.py")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return run


def test_each_test_is_counted_and_named(outcome):
    code, out = outcome(GOOD, "def test_other(): pass", options=("-v", "-ra"))
    assert code == 0, out
    assert "5 passed, 1 skipped, 1 xfailed" in out  # the suite's own test among them
    for name in ("share_0.py::test_numbers[2]", "share_1.py::test_other", "test_main.py::test_them"):
        assert re.search(rf"{re.escape(name)} PASSED", out), out
    assert re.search(r"SKIPPED \[1\] .*share_0.py:\d+: needs a moon", out)
    assert re.search(r"XFAIL .*test_that_is_known_to_fail - known", out)
    assert "100%" in out


def test_a_failure_comes_with_its_traceback_and_fails_the_suite(outcome):
    code, out = outcome(GOOD, "def test_wrong():\n    left = 3\n    assert left == 4")
    assert code == 1
    assert "assert 3 == 4" in out
    assert re.search(r"FAILED .*share_1.py::test_wrong", out)
    assert "1 of the suite's tests failed" in out
    assert "2 failed, 3 passed, 1 skipped, 1 xfailed" in out


def test_an_error_in_a_fixture_is_an_error(outcome):
    broken = "import pytest\n@pytest.fixture\ndef bad(): 1 / 0\ndef test_it(bad): pass"
    code, out = outcome(broken)
    assert code == 1
    assert "ZeroDivisionError" in out
    assert re.search(r"ERROR .*share_0.py::test_it", out)


def test_a_skip_that_is_not_listed_fails(outcome):
    code, out = outcome("import pytest\ndef test_it(): pytest.skip('no time')")
    assert code == 1
    assert "unexpected skip: Skipped: no time" in out
    assert re.search(r"FAILED .*share_0.py::test_it", out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\ndef test_it(): os._exit(3)", "exit code 3; the last test started: .*share_0.py::test_it"),
        ("import os, signal\ndef test_it(): os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11; .*test_it"),
        ("raise RuntimeError('at import')", "exit code 2; .*none was started(.|\n)*RuntimeError: at import"),
        ("import pytest\npytest.skip('all of it', allow_module_level=True)", "exit code 5; .*none was started"),
    ],
    ids=["exit", "signal", "import", "module skipped"],
)
def test_a_process_that_does_not_come_to_its_end_fails(text, message, outcome):
    code, out = outcome(text)
    assert code == 1
    assert re.search(message, out), out


def test_a_process_that_takes_too_long_is_killed(outcome):
    code, out = outcome("import time\ndef test_it(): time.sleep(600)", timeout=8)
    assert code == 1
    assert re.search(r"not done after 8 s; the last test started: .*share_0.py::test_it", out), out


def test_the_main_run_may_stop_at_the_first_failure(outcome):
    slow = "import time\ndef test_slow(): time.sleep(600)"
    code, out = outcome("def test_wrong(): assert False", slow, options=("-x",))
    assert code == 1
    assert "stopping after 1 failures" in out or "stopping after 2 failures" in out
