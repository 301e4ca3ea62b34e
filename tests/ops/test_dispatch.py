"""Which backend serves an op, and what is said where none can."""

import logging

import pytest
import torch

from fastfg import ops
from fastfg.ops import dispatch, launch, native
from fastfg.ops.dispatch import BACKENDS, OPS, BackendError, choose, why_not


@pytest.fixture(autouse=True)
def _forget():
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def nothing_lacks(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda op: None)
    monkeypatch.setattr(launch, "why_not", lambda op: None)


@pytest.mark.usefixtures("nothing_lacks")
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "cpp"),
        ("cpu", torch.float64, "cpp"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "reference"),
        ("meta", torch.float32, "reference"),
    ],
)
def test_auto_picks_by_device_and_says_so_once(device, dtype, expected, caplog):
    with caplog.at_level(logging.INFO, "fastfg"):
        assert [choose("gate", "auto", device, dtype) for _ in range(3)] == [expected] * 3
    assert caplog.messages == [f"gate on {device} ({dtype}): {expected}"]


def test_without_native_or_triton_auto_goes_on_in_python(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda op: "it was not built")
    monkeypatch.setattr(launch, "why_not", lambda op: "triton is not installed")
    assert choose("gate", "auto", "cpu", torch.float32) == "reference"
    assert choose("gate", "auto", "cuda", torch.float32) == "reference"


@pytest.mark.usefixtures("nothing_lacks")
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "expected"),
    [
        ("reference", "meta", torch.float64, None),
        ("cpp", "cuda", torch.float32, "it runs on the CPU, and the tensors are on cuda"),
        ("triton", "cpu", torch.float32, "it runs on CUDA devices, and the tensors are on cpu"),
        ("triton", "cuda", torch.float64, "it has no float64 version"),
        ("cuda", "cuda", torch.float32, "there is no CUDA C++ version"),
    ],
)
def test_a_named_backend_runs_or_says_why_not(backend, device, dtype, expected):
    if expected is None:
        assert choose("gate", backend, device, dtype) == backend
        return
    with pytest.raises(BackendError) as raised:
        choose("gate", backend, device, dtype)
    assert str(raised.value) == f"backend: {backend!r} can't run gate: {expected}"


def test_every_reason_is_given(monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda op: "triton is not installed")
    with pytest.raises(BackendError) as raised:
        ops.gate(torch.zeros(2, 3, dtype=torch.float64), 1.0, 10.0, backend="triton")
    assert str(raised.value).split(": ")[-1].split("; ") == [
        "triton is not installed",
        "it runs on CUDA devices, and the tensors are on cpu",
        "it has no float64 version",
    ]


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of .*'cpp', 'triton', 'cuda'.*, got 'cudnn'"):
        ops.gate(torch.zeros(2, 3), 1.0, 10.0, backend="cudnn")


def test_nothing_falls_back_when_a_kernel_fails(monkeypatch):
    from fastfg import reference

    def broken(*arguments):
        raise RuntimeError("out of something")

    monkeypatch.setattr(dispatch, "call", broken)
    monkeypatch.setattr(native, "why_not", lambda op: None)
    monkeypatch.setattr(torch.ops, "fastfg", type("Namespace", (), {"gate": None}))
    monkeypatch.setattr(reference, "gate", lambda *a: pytest.fail("fell back"))
    with pytest.raises(RuntimeError, match="out of something"):
        ops.gate(torch.zeros(2, 3), 1.0, 10.0)


def test_what_lacks_an_op_says_so(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert launch.why_not.__wrapped__("gate") == "triton is not installed"
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None if "fastfg" in name else "found")
    assert launch.why_not.__wrapped__("gate") == "there is no Triton version"


def test_a_native_library_that_does_not_fit_says_so(monkeypatch):
    def missing(name):
        raise ImportError("no such file")

    with monkeypatch.context() as patch:
        patch.setattr(native.importlib, "import_module", missing)
        assert native.why_not.__wrapped__("gate") == (
            "fastfg._C is not built or does not load (no such file); see FASTFG_BUILD in setup.py"
        )
    monkeypatch.setattr(native.importlib, "import_module", lambda name: None)
    assert native.why_not.__wrapped__("no_such_op") == "there is no C++ version"
    if native.why_not("gate") is None:
        monkeypatch.setattr(native, "schema", lambda op: "gate(Tensor scores) -> Tensor")
        assert native.why_not.__wrapped__("gate") == (
            "fastfg._C was built from other sources and must be built again: it has "
            "fastfg::gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor, "
            "not fastfg::gate(Tensor scores) -> Tensor"
        )


def test_every_op_is_in_the_table():
    assert list(OPS) == ops.__all__
    for op in OPS:
        assert why_not(op, "reference") is None
        for backend in BACKENDS[1:]:
            assert why_not(op, backend) is None or isinstance(why_not(op, backend), str)
