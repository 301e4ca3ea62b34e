"""Every op on every backend that can run here, against the reference in float64."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfg import ops, reference
from fastfg.dispatch import BACKENDS, BackendError, implementation, why_not
from tests.ops.cases import CASES, cast, exact, randn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = torch.zeros(1, device=DEVICE)
LIVE = [(op, backend) for op in ops.__all__ for backend in BACKENDS if why_not(op, backend, HERE) is None]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def moved(arguments):
    return tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments)


def backends(op):
    return [backend for name, backend in LIVE if name == op]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name, dtype):
    op, arguments = CASES[name]
    given_ = moved(cast(arguments, dtype))
    expected = outputs(exact(op, given_))
    for backend in backends(op):
        if why_not(op, backend, given_[0]) is not None:
            continue
        kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in given_]
        found = outputs(getattr(ops, op)(*given_, backend=backend))
        for ours, theirs in zip(found, expected, strict=True):
            if ours.is_floating_point():
                assert ours.dtype == dtype
                scale = float(theirs.abs().max()) if theirs.numel() else 1.0
                torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
            elif dtype == torch.float64:
                assert torch.equal(ours, theirs)
        for a, b in zip(given_, kept, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] in ("project", "encode_project")])
def test_half_precision_is_no_worse_than_twice_torchs(name, dtype):
    op, arguments = CASES[name]
    given_ = moved(cast(arguments, dtype))
    expected = exact(op, given_)
    torchs = (getattr(reference, op)(*given_).double() - expected).abs()
    floor = torch.finfo(dtype).eps * float(expected.abs().max()) if expected.numel() else 0.0
    for backend in backends(op):
        ours = (getattr(ops, op)(*given_, backend=backend).double() - expected).abs()
        assert ours.numel() == 0 or float(ours.max()) <= 2 * float(torchs.max()) + floor


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 700), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_topk_ties_go_to_the_lowest_index(seed, T, F, levels):
    """Whole numbers, so that every sum is exact and ties are everywhere."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (T, 3), generator=random).float().to(DEVICE)
    W_enc = torch.randint(-levels, levels + 1, (3, F), generator=random).float().to(DEVICE)
    k = int(torch.randint(1, F + 1, (), generator=random))
    expected = reference.encode_topk(x, W_enc, torch.zeros(F, device=DEVICE), None, k)
    for backend in backends("encode_topk"):
        found = ops.encode_topk(x, W_enc, torch.zeros(F, device=DEVICE), None, k, backend=backend)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_nan_is_seen(op, backend):
    """A NaN in the first argument reaches the part of the result that it belongs to, and no other part."""
    names = {"gate": "gate (7, 49)", "relevancy": "relevancy C=2 B=2 H=6 N=197 dh=64 transmm"}
    name = names.get(op) or next(n for n in CASES if n.startswith(f"{op} ") and "T=197" in n)
    arguments = list(moved(cast(CASES[name][1], torch.float32)))
    where = 1 if op == "relevancy" else 0  # q, of the second image
    arguments[where] = arguments[where].clone()
    arguments[where][1].view(-1)[5] = torch.nan
    found = outputs(getattr(ops, op)(*arguments, backend=backend))[0]
    if op == "relevancy":
        assert found[:, 1].isnan().any()
        assert not found[:, 0].isnan().any()
    else:
        assert found[1].isnan().any()
        assert not found[0].isnan().any()


@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_memory_layout_does_not_matter_and_results_repeat(op, backend):
    name = {"gate": "gate (3, 196)", "relevancy": "relevancy C=3 B=2 H=3 N=50 dh=48 paper"}.get(op)
    name = name or next(n for n in CASES if n.startswith(f"{op} ") and "T=197" in n)
    arguments = moved(cast(CASES[name][1], torch.float32))

    def strided(value):
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype, device=value.device)
        wide[..., ::2] = value
        return wide[..., ::2]

    plain = outputs(getattr(ops, op)(*arguments, backend=backend))
    again = outputs(getattr(ops, op)(*arguments, backend=backend))
    other = outputs(getattr(ops, op)(*map(strided, arguments), backend=backend))
    for a, b, c in zip(plain, again, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_gate_of_equal_scores_is_one():
    for backend in backends("gate"):
        assert ops.gate(torch.full((2, 5), 3.0, device=DEVICE), 1.0, 10.0, backend=backend).eq(1).all()


def test_features_out_of_range_are_refused():
    if "cpp" not in backends("project"):
        pytest.skip("the native ops are not built")
    with pytest.raises(IndexError, match="indices: expected features from 0 to 9, got 10"):
        ops.project(randn(1, 4), randn(10, 4), randn(1, 1), torch.tensor([[10]]), backend="cpp")


@pytest.mark.parametrize("op", [op for op, backend in LIVE if backend == "cpp"])
def test_native_ops_are_proper_torch_ops(op):
    name = next(n for n in CASES if n.split()[0].rstrip(",") == op and "T=0" not in n)
    arguments = cast(CASES[name][1], torch.float32)
    call = getattr(torch.ops.fastfg, op)
    if op == "gate":
        arguments = (arguments[0].reshape(1, -1), torch.ones(1), torch.full((1,), 10.0))
    if op == "relevancy":
        arguments = (*arguments[:-1], False)
    if op == "encode_project":
        a = arguments[-1]
        arguments = (*arguments[:-1], a.name, a.threshold, a.r_mag, a.b_gate, a.b_mag)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(lambda *given: call(*given), fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(outputs(compiled), outputs(call(*arguments)), strict=True):
        assert torch.equal(a, b)


def test_a_named_backend_runs_or_says_why_not():
    assert implementation("gate", "reference", HERE) is reference.gate
    with pytest.raises(BackendError, match="backend: 'cuda' can't run gate: there is no CUDA C\\+\\+ version"):
        implementation("gate", "cuda", HERE)
    meta = torch.zeros(1, device="meta")
    with pytest.raises(BackendError, match="backend: 'cpp' can't run gate: it runs on the CPU, .* on meta"):
        implementation("gate", "cpp", meta)
    assert implementation("gate", "auto", meta) is reference.gate


def test_without_the_native_ops_auto_goes_on_in_python(monkeypatch):
    from fastfg import native

    monkeypatch.setattr(native, "why_not", lambda: "it was not built")
    assert implementation("gate", "auto", torch.zeros(1)) is reference.gate
    with pytest.raises(BackendError, match="backend: 'cpp' can't run gate: it was not built"):
        implementation("gate", "cpp", torch.zeros(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.project(randn(3, 4), randn(9, 5), randn(3, 2), torch.zeros(3, 2).long()),
            r"W_dec: expected \[F, 4\]",
        ),
        (lambda: ops.encode_topk(randn(3, 4), randn(4, 9), randn(9), None, 10), "k: expected 1 to 9, got 10"),
        (lambda: ops.gate(randn(3, 0), 1.0, 10.0), r"scores: expected \[..., P\] with at least one patch"),
        (lambda: ops.relevancy(randn(1, 2, 5), *randn(4, 2, 3, 6, 8), 1.0), r"q: expected \[2, H, 5, dh\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
