"""The benchmarks: a tiny suite from end to end, and what happens to a wrong result."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.ceilings import Ceilings
from bench.clock import Clock, StandIn
from bench.report import read_lines, report
from bench.runner import Benchmark, Session, error
from bench.suite import Case, Provider, Suite, Work, direct
from fastfg.ops.dispatch import BackendError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [(), ("-p", "no:benchmark")], ids=["pytest-benchmark", "stand-in"])
def test_one_suite_as_a_process(tmp_path, plugin):
    chosen = [f"bench/bench_gate.py::test_gate[C27-B2-P196-float32-{name}]" for name in ("reference", "triton")]
    command = [sys.executable, "-m", "pytest", *chosen, "--size", "small", "--results", str(tmp_path)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *plugin],
        cwd=ROOT,
        env=alone,  # under xdist pytest-benchmark does not time anything
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton: " in done.stdout  # skipped, with the reason
    (file,) = tmp_path.glob("*/gate.jsonl")
    assert f"1 lines written to {file}" in done.stdout
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["name"], line["provider"], line["backend"], line["bar"]) == ("gate", "reference", "reference", None)
    assert (line["shape"], line["dtype"]) == ({"C": 27, "B": 2, "P": 196}, "float32")
    assert 0 < line["p20"] <= line["median"] <= line["p80"]
    assert line["rounds"] >= 5
    assert 0 < line["floor"] < line["median"]
    assert line["floor_ratio"] == pytest.approx(line["median"] / line["floor"])
    assert line["error"] < 1e-4
    assert line["torch"] == torch.__version__
    assert all(line[key] for key in ("commit", "date", "device", "threads", "fastfg"))
    assert "| reference |" in report(read_lines(tmp_path))


def test_the_shapes_that_have_a_target_are_found():
    """``gpu.sh`` selects these shapes with ``pytest -k``, in every suite except ``gate``, which has none."""
    targets = re.search(r'^targets="(.+)"$', (ROOT / "bench" / "gpu.sh").read_text(), re.MULTILINE)[1]
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--size", "full", "--collect-only", "-k"]
    done = subprocess.run(
        [*command, f"bfloat16 and ({targets})", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = set(re.findall(r"::test_(\w+)\[", done.stdout))
    assert found == {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")} - {"gate"}
    for word in targets.split(" or "):
        assert f"{word}-" in done.stdout, word


def refuse(x):
    raise BackendError("backend: not on Sundays")


def exhaust(x):
    raise torch.OutOfMemoryError("not even one more byte")


def doubled():
    """A suite of one op, ``2 x``, with providers that are right, wrong or unavailable."""
    return Suite(
        name="doubled",
        small=[Case({"T": 5})],
        full=[],
        providers={
            "right": Provider(direct(lambda x: 2 * x)),
            "wrong": Provider(direct(lambda x: 2.001 * x)),
            "NaN": Provider(direct(lambda x: x * torch.nan)),
            "a part": Provider(direct(lambda x: x), bar="part"),
            "refusing": Provider(direct(refuse)),
            "too large": Provider(direct(exhaust)),
            "absent": Provider(direct(refuse), why_not=lambda case, device: f"nothing for {case.T} on a {device}"),
        },
        arguments=lambda case, device: (case.generator(device)(case.T, 3),),
        part=lambda arguments: (arguments[0][:2],),
        pick=lambda result, arguments: (result[:2],),
        exact=lambda x: 2 * x,
        work=lambda case: Work(bytes=1e3, flops=1e3),
        beside=lambda case, arguments: ("torch", functools.partial(torch.mul, arguments[0], 2)),
    )


@pytest.fixture
def bench(tmp_path):
    """``bench(provider)`` runs one provider of the suite and returns the lines written so far."""
    session, clock, suite = Session("cpu", tmp_path), Clock("cpu"), doubled()
    session._ceilings = Ceilings(1e9, 1e9)

    def run(provider):
        Benchmark(session, suite, suite.small[0], provider, clock, lambda: StandIn(clock))()
        return [json.loads(line) for line in (tmp_path / "cpu" / "doubled.jsonl").read_text().splitlines()]

    run.folder = tmp_path
    return run


def test_a_right_result_is_timed(bench):
    (line,) = bench("right")
    assert line["error"] < 1e-7
    assert line["floor"] == pytest.approx(1e-6)
    assert line["beside"] == "torch"
    assert line["ratio"] > 0


@pytest.mark.parametrize("provider", ["wrong", "NaN"])
def test_a_wrong_result_is_not_timed(bench, provider):
    with pytest.raises(pytest.fail.Exception, match=f"doubled by {provider} is wrong and was not timed: error"):
        bench(provider)
    assert not list(bench.folder.iterdir())


def test_a_part_is_not_checked_and_has_no_floor(bench):
    (line,) = bench("a part")
    assert line["error"] is None
    assert "floor" not in line


@pytest.mark.parametrize(
    ("provider", "reason"), [("refusing", "backend: not on Sundays"), ("absent", "nothing for 5 on a cpu")]
)
def test_a_provider_that_cannot_run_is_skipped_with_a_reason(bench, provider, reason):
    with pytest.raises(pytest.skip.Exception, match=f"{provider}: {reason}"):
        bench(provider)


def test_memory_is_freed_before_a_skip(bench):
    with pytest.raises(pytest.skip.Exception, match="too large: out of memory") as skipped:
        bench("too large")
    assert skipped.value.__context__ is None  # the frames of an error keep tensors alive


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_result_on_the_cpu_is_compared_too():
    x = torch.randn(3)
    assert error((x,), (x.double().cuda(),)) == 0


def test_no_line_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session, clock, suite = Session("cpu", None), Clock("cpu"), doubled()
    session._ceilings = Ceilings(1e9, 1e9)
    Benchmark(session, suite, suite.small[0], "right", clock, lambda: StandIn(clock))()
    assert not list(tmp_path.iterdir())
    assert session.written == {}
