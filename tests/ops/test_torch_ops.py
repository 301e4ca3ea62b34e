"""Every backend's op is a torch op with one schema and a fake; every public op compiles into one graph."""

import functools
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfg import ops, reference
from fastfg.ops import native
from fastfg.ops.dispatch import choose, torch_op
from tests.ops.cases import OPS, PAIRS, TYPICAL, cast, device_of, each, outputs, turned

LAYOUTS = {"plain": lambda i, t: t, "turned": turned}  # the same numbers, in another order in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[1] != "reference"])
def test_schema_and_fake_are_right(op, backend, dtype, layout, monkeypatch):
    """Uses the arguments that the public op passes to the torch op."""
    checked = []

    def checking(*which):
        assert which == (op, backend)
        kernel = torch_op(*which).default

        def check(*arguments):
            arguments = each(arguments, LAYOUTS[layout])
            torch.library.opcheck(kernel, arguments, test_utils=("test_schema", "test_faketensor"))
            checked.append(op)
            return kernel(*arguments)

        return check

    monkeypatch.setattr(sys.modules[f"fastfg.ops.{op}"], "torch_op", checking)
    getattr(ops, op)(*cast(op, TYPICAL[op](), dtype, device_of(backend)), backend=backend)
    assert checked == [op]


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_the_public_op_compiles_into_one_graph(op, backend):
    torch.compiler.reset()
    arguments = cast(op, TYPICAL[op](), torch.float32, device_of(backend))
    function = functools.partial(getattr(ops, op), backend=backend)
    compiled = torch.compile(lambda *given: function(*given), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(outputs(compiled(*arguments)), outputs(function(*arguments)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_first_use_may_be_in_a_compiled_program():
    code = """
import sys, torch
from fastfg import ops
before = "torch._dynamo" in sys.modules
compiled = torch.compile(lambda scores: ops.gate(scores, 0.7, 5.0), fullgraph=True, backend="eager")
print(before, compiled(torch.ones(2, 5)).eq(1).all().item())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]


@pytest.mark.parametrize("op", OPS)
def test_triton_ops_trace_without_a_gpu(op):
    assert choose(op, "auto", "cuda", torch.float32) == "triton"
    arguments = cast(op, TYPICAL[op](), torch.float32, "cpu")
    with FakeTensorMode():
        there = each(arguments, lambda i, t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        fakes = outputs(getattr(ops, op)(*there))
    reals = outputs(getattr(reference, op)(*arguments))
    for fake, real in zip(fakes, reals, strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, "cuda")


@pytest.mark.parametrize("op", ops.__all__)
def test_the_native_ops_are_all_there(op):
    """Fails with the reason if the library was not built, or was built from other sources."""
    assert native.why_not(op) is None


def test_a_schema_is_written_as_torch_writes_it():
    assert str(torch.ops.fastfg_triton.gate.default._schema) == (
        "fastfg_triton::gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor"
    )
    assert "Tensor? b_dec, int k) -> (Tensor, Tensor)" in str(torch.ops.fastfg_triton.encode_topk.default._schema)
