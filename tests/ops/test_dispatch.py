"""Which backend runs an op, and the error if none can."""

import logging
from types import SimpleNamespace

import pytest
import torch

from fastfg import ops, reference
from fastfg.ops import dispatch, launch, native
from fastfg.ops.dispatch import OPS, BackendError, choose, why_not


@pytest.fixture(autouse=True)
def _forget():
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def nothing_lacks(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda op: None)
    monkeypatch.setattr(launch, "why_not", lambda op: None)
    monkeypatch.setattr(launch, "why_not_on", lambda device: None)


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


def test_auto_uses_the_reference_without_native_and_triton(monkeypatch):
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
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of .*'cpp', 'triton'.*, got 'cuda'"):
        ops.gate(torch.zeros(2, 3), 1.0, 10.0, backend="cuda")


def test_nothing_falls_back_when_a_kernel_fails(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of something")

    monkeypatch.setattr(native, "why_not", lambda op: None)
    monkeypatch.setattr(torch.ops, "fastfg", SimpleNamespace(gate=broken))
    monkeypatch.setattr(reference, "gate", lambda *a: pytest.fail("fell back"))
    with pytest.raises(RuntimeError, match="out of something"):
        ops.gate(torch.zeros(2, 3), 1.0, 10.0)


def test_a_missing_op_has_a_reason(monkeypatch):
    why_not = launch.why_not.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(launch.importlib.util, "find_spec", lambda name: None)
        assert why_not("gate") == "triton is not installed"
        patch.setattr(launch.importlib.util, "find_spec", lambda name: None if "kernels" in name else "found")
        assert why_not("gate") == "there is no Triton version"
    assert why_not("no_such_op") in ("there is no Triton version", "triton is not installed")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_not("gate") == "ROCm is not supported: the kernels hold NVIDIA instructions"


@pytest.fixture
def cards(monkeypatch):
    """A machine with GPUs of the given compute capabilities."""

    def install(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])

    monkeypatch.setattr(launch, "why_not", lambda op: None)
    return install


def test_old_gpus_cannot_run_triton(cards):
    """The shared memory of an old GPU is too small for the tiles."""
    cards((7, 5), (8, 6))
    expected = "it needs a device of compute capability 8.0 (sm_80) or later: GPU 0 has 7.5"
    assert choose("gate", "auto", "cuda:0", torch.float16) == "reference"
    assert choose("gate", "auto", "cuda:1", torch.float16) == "triton"
    with pytest.raises(BackendError) as raised:
        choose("gate", "triton", "cuda:0", torch.float16)
    assert str(raised.value) == f"backend: 'triton' can't run gate: {expected}"
    assert why_not("gate", "triton") is None  # the other GPU can
    cards((7, 5))
    assert why_not("gate", "triton") == expected
    cards()
    assert why_not("gate", "triton") == "there is no CUDA device"


def test_a_library_that_does_not_load_says_so(monkeypatch):
    def missing(name):
        raise ImportError("no such file")

    monkeypatch.setattr(native.importlib, "import_module", missing)
    assert native.load() == "fastfg._C is not built or does not load (no such file); see FASTFG_BUILD in setup.py"


def test_a_library_of_other_sources_says_so():
    assert native.mismatch("no_such_op", "no_such_op() -> Tensor") == "there is no C++ version"
    assert native.mismatch("gate", "gate(Tensor scores) -> Tensor") == (
        "fastfg._C was built from other sources and must be built again: it has "
        "fastfg::gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor, "
        "not fastfg::gate(Tensor scores) -> Tensor"
    )


def test_asking_does_not_register():
    """Asking never registers anything: an op is registered once, when its own file is imported."""
    before = set(torch._C._dispatch_get_all_op_names())
    assert {f"fastfg_triton::{op}" for op in OPS} <= before
    for op in (*OPS, "no_such_op"):
        launch.why_not.__wrapped__(op)
    assert set(torch._C._dispatch_get_all_op_names()) == before


def test_every_op_is_registered():
    assert ops.__all__ == OPS
    like = torch.zeros(1)
    for op in OPS:
        assert why_not(op, "reference", like) is None
        assert why_not(op, "cpp", like) == native.UNLOADED
        assert "it runs on CUDA devices, and the tensors are on cpu" in why_not(op, "triton", like)
