"""Every backend's op is a torch op with one schema and a fake; every public op compiles into one graph."""

import functools
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfg import ops, reference
from fastfg.ops import launch, native
from fastfg.ops.dispatch import NAMESPACES, choose
from fastfg.ops.schema import as_reference, call, schema
from tests.ops.cases import LIVE, TYPICAL, cast, each, outputs, turned

NATIVE = [(op, backend) for op, backend in LIVE if backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16)


LAYOUTS = {"plain": lambda i, t: t, "turned": turned}  # the same numbers, in another order in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), NATIVE)
def test_schema_and_fake_are_right(op, backend, dtype, layout):
    torch_op = getattr(getattr(torch.ops, NAMESPACES[backend]), op).default
    checked = []

    def check(*arguments):
        arguments = each(arguments, LAYOUTS[layout])
        torch.library.opcheck(torch_op, arguments, test_utils=("test_schema", "test_faketensor"))
        checked.append(op)
        return torch_op(*arguments)

    call(op, check, *cast(op, TYPICAL[op](), dtype))
    assert checked == [op]


@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_the_public_op_compiles_into_one_graph(op, backend):
    torch.compiler.reset()
    arguments = cast(op, TYPICAL[op](), torch.float32)
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


@pytest.mark.parametrize("op", ops.__all__)
def test_arguments_go_to_the_torch_op_and_back(op):
    """A Triton kernel has its reference's signature; here the reference stands in for the kernel."""
    arguments = cast(op, TYPICAL[op](), torch.float32)
    judge = getattr(reference, op)
    through = call(op, lambda *given: judge(*as_reference(op, *given)), *arguments)
    for ours, theirs in zip(outputs(through), outputs(judge(*arguments)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", [op for op in ops.__all__ if launch.why_not(op) is None])
def test_triton_ops_trace_without_a_gpu(op):
    assert choose(op, "auto", "cuda", torch.float32) == "triton"
    arguments = cast(op, TYPICAL[op](), torch.float32, "cpu")
    with FakeTensorMode():
        there = each(arguments, lambda i, t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        fakes = outputs(getattr(ops, op)(*there))
    reals = outputs(getattr(reference, op)(*arguments))
    for fake, real in zip(fakes, reals, strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, "cuda")


@pytest.mark.skipif(not NATIVE or NATIVE[0][1] != "cpp", reason="the native ops are not built")
@pytest.mark.parametrize("op", ops.__all__)
def test_the_native_ops_are_all_there(op):
    assert native.why_not(op) is None


def test_a_schema_is_said_in_torchs_words():
    assert schema("gate") == "gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor"
    assert schema("encode_topk").endswith("Tensor? b_dec, int k) -> (Tensor, Tensor)")
