"""Suites in their own processes: what the main run reports, and what fails."""

from __future__ import annotations

import os
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
BAD = """
import pytest

def test_wrong():
    left = 3
    assert left == 4

@pytest.fixture
def broken(): 1 / 0

def test_with_a_fixture(broken): pass

def test_in_a_hurry(): pytest.skip("no time")
"""
CRASHES = {
    "import os\ndef test_it(): os._exit(3)": "exit code 3; the last test started: .*share_0.py::test_it",
    "import os\ndef test_it(): os.kill(os.getpid(), 11)": "exit code -11; the last test started: .*share_1.py::test_it",
    "raise RuntimeError('at import')": "exit code 2; the last test started: none(.|\n)*RuntimeError: at import",
    "import pytest\npytest.skip('all', allow_module_level=True)": "exit code 5; the last test started: none",
}
SLOW = "import time\ndef test_it(): time.sleep(600)"


@pytest.fixture
def outcome(tmp_path):
    """Run a suite of files with these contents in a main run. Returns its exit code and its output."""

    def run(*texts, timeout=300.0, options=("-v",)):
        shares = []
        for number, text in enumerate(texts):
            file = tmp_path / f"share_{number}.py"
            file.write_text(text)
            shares.append([str(file)])
        main = tmp_path / "test_main.py"
        main.write_text(SUITE.format(shares=shares, timeout=timeout))
        command = [sys.executable, "-m", "pytest", "-ra", "-p", "tests.subprocesses", f"--rootdir={tmp_path}"]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a quick start
        command += ["-p", "no:cacheprovider", *options, str(main)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return run


def test_a_skip_of_the_main_run_fails_where_none_is_expected(tmp_path):
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')")
    text = "import pytest\ndef test_a(): pytest.skip('no time')\ndef test_b(): pytest.skip('needs a CUDA device')"
    (tmp_path / "test_both.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "tests.skips", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for option, summary in (
        ([], "3 skipped"),
        (["--no-unexpected-skips", "--continue-on-collection-errors"], "1 failed, 1 skipped, 1 error"),
    ):
        run = [*command, *option]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert summary in done.stdout, done.stdout
    assert "unexpected skip: Skipped: no time" in done.stdout
    assert "unexpected skip: Skipped: could not import 'no_such_module'" in done.stdout


def test_each_test_is_counted_and_named(outcome):
    code, out = outcome(GOOD, "def test_other(): pass")
    assert code == 0, out
    assert "5 passed, 1 skipped, 1 xfailed" in out  # the suite's own test among them
    for name in ("share_0.py::test_numbers[2]", "share_1.py::test_other", "test_main.py::test_them"):
        assert re.search(rf"{re.escape(name)} PASSED", out), out
    assert re.search(r"SKIPPED \[1\] .*share_0.py:\d+: needs a moon", out)
    assert re.search(r"XFAIL .*test_that_is_known_to_fail - known", out)
    assert "100%" in out


def test_failures_come_with_their_tracebacks_and_fail_the_suite(outcome):
    code, out = outcome(GOOD, BAD)
    assert code == 1, out
    assert "assert 3 == 4" in out
    assert re.search(r"FAILED .*share_1.py::test_wrong", out)
    assert "ZeroDivisionError" in out
    assert re.search(r"ERROR .*share_1.py::test_with_a_fixture", out)
    assert "unexpected skip: Skipped: no time" in out
    assert re.search(r"FAILED .*share_1.py::test_in_a_hurry", out)
    assert "3 of the suite's tests failed" in out
    assert "3 failed, 3 passed, 1 skipped, 1 xfailed, 1 error" in out


def test_a_process_that_ends_early_fails(outcome):
    code, out = outcome(*CRASHES)
    assert code == 1, out
    for message in CRASHES.values():
        assert re.search(message, out), out


def test_a_process_that_takes_too_long_is_killed(outcome):
    code, out = outcome(SLOW, timeout=0.5)
    assert code == 1, out
    assert re.search("share_0.py: not done after 0.5 s; the last test started: ", out), out


def test_the_main_run_may_stop_at_the_first_failure(outcome):
    code, out = outcome("def test_wrong(): assert False", SLOW, options=("-x",))
    assert code == 1, out
    assert re.search(r"FAILED .*share_0.py::test_wrong", out)
    assert "stopping after 1 failures" in out


def test_suites_have_a_mark_of_their_own(outcome):
    code, out = outcome("def test_a(): pass", options=("-m", "not processes"))
    assert code == 5, out  # nothing was selected
    assert outcome("def test_a(): pass", options=("-m", "processes"))[0] == 0


def test_a_worker_of_xdist_refuses_a_suite(outcome):
    code, out = outcome("def test_a(): pass", options=("-p", "xdist", "-n", "1"))
    assert code == 1, out
    assert "expected a run without pytest-xdist's workers: pytest -m processes" in out
