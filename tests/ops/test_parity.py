"""Every op on every backend that can run here, in every dtype, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfg import ops, reference
from tests.ops import cases
from tests.ops.cases import CASES, DEVICE, LIVE, SMALL, TYPICAL, backends, cast, each, outputs, randn, strided, turned
from tests.ops.compare import errors, exact, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_in_float64(case, dtype):
    op, build = CASES[case]
    arguments = cast(op, build(), dtype)
    expected = exact(op, arguments)
    for backend in backends(op, arguments[0]):
        found = run(op, arguments, backend)
        assert max(errors(op, arguments, found, expected)) <= TOLERANCE[dtype], backend
        for ours, theirs in zip(outputs(found), expected, strict=True):
            assert ours.dtype == (dtype if theirs.is_floating_point() else theirs.dtype)
            assert theirs.is_floating_point() or dtype == torch.float32 or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_half_precision_is_no_worse_than_twice_torchs(case, dtype):
    op, build = CASES[case]
    arguments = cast(op, build(), dtype)
    expected = exact(op, arguments)
    torchs = errors(op, arguments, run(op, arguments, "reference"), expected)
    for backend in backends(op, arguments[0]):
        found = outputs(run(op, arguments, backend))
        # results in float32 may be products of three bfloat16 parts
        floors = [5e-5 if t.dtype == torch.float32 else torch.finfo(dtype).eps for t in found]
        for ours, theirs, floor in zip(errors(op, arguments, found, expected), torchs, floors, strict=True):
            assert ours <= 2 * theirs + floor, backend


def sizes(*bounds):
    return st.tuples(*(st.integers(low, high) for low, high in bounds))


@st.composite
def shapes(draw, op):
    """The builder's arguments for ``op``."""
    if op in ("encode_topk", "project"):
        T, d, F = draw(sizes((0, 40), (1, 70), (1, 300)))
        return T, d, F, draw(st.integers(1, F))
    if op == "encode_project":
        return draw(st.sampled_from(cases.STREAMING)), *draw(sizes((0, 40), (1, 70), (1, 300)))
    if op == "gate":
        return *draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.integers(1, 300))
    C, B, H, N, dh = draw(sizes((1, 4), (0, 3), (1, 3), (1, 70), (1, 40)))
    identity = draw(st.sampled_from(["transmm", "paper"]))
    if op == "relevancy":
        return C, B, H, N, dh, draw(st.booleans()), identity
    return C, B, H, N, dh, draw(st.integers(1, N)), *draw(sizes((1, 40), (1, 99), (1, 20))), identity


@pytest.mark.parametrize("op", ops.__all__)
def test_any_shape(op):
    @given(shapes(op))
    @settings(max_examples=25, deadline=None)
    def check(shape):
        arguments = cast(op, getattr(cases, op)(*shape), torch.float32)
        expected = exact(op, arguments)
        for backend in backends(op, arguments[0]):
            assert max(errors(op, arguments, run(op, arguments, backend), expected)) <= 1e-5, backend

    check()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 700), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_topk_ties_go_to_the_lowest_index(seed, T, F, levels):
    """Whole numbers, so that every sum is exact and ties are everywhere."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (T, 3), generator=random).float().to(DEVICE)
    W_enc = torch.randint(-levels, levels + 1, (3, F), generator=random).float().to(DEVICE)
    k = int(torch.randint(1, F + 1, (), generator=random))
    expected = (x @ W_enc).sort(dim=-1, descending=True, stable=True)
    for backend in backends("encode_topk", x):
        values, indices = ops.encode_topk(x, W_enc, torch.zeros(F, device=DEVICE), None, k, backend=backend)
        assert torch.equal(values, expected.values[:, :k].relu())
        assert torch.equal(indices, expected.indices[:, :k])


@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_nan_is_seen(op, backend):
    """A NaN in the second token, or image, reaches the part of the result that it belongs to, and no other part."""
    arguments = list(cast(op, TYPICAL[op](), torch.float32))
    where = {"relevancy": 1, "gated_relevancy": 6}.get(op, 0)  # q; g; the first
    arguments[where][1].view(-1)[5] = torch.nan
    found = outputs(run(op, arguments, backend))
    for result in found if op == "gated_relevancy" else found[:1]:
        images = result.transpose(0, 1) if "relevancy" in op and len(result) == 3 else result
        assert images[1].isnan().any()
        assert not images[0].isnan().any()


@pytest.mark.parametrize("backend", [backend for op, backend in LIVE if op == "encode_topk"])
def test_a_nan_among_ties_is_chosen_first(backend):
    b_enc = torch.tensor([1.0, torch.nan, 1.0, 1.0], device=DEVICE)
    x, W_enc = torch.zeros(1, 2, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    values, indices = ops.encode_topk(x, W_enc, b_enc, None, 2, backend=backend)
    assert indices.tolist() == [[1, 0]]
    assert values.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_memory_layout_does_not_matter_and_results_repeat(op, backend):
    arguments = cast(op, TYPICAL[op](), torch.float32)

    plain, again = (outputs(run(op, arguments, backend)) for _ in range(2))
    for layout in (strided, turned):
        other = outputs(run(op, each(arguments, layout), backend))
        for a, b, c in zip(plain, again, other, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


@pytest.fixture
def poison():
    """New memory is full of NaN (of the largest number, where it is of integers) until it is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # torch's default
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", SMALL)
def test_every_element_is_written(case, poison):
    op, build = CASES[case]
    arguments = cast(op, build(), torch.float32)
    for backend in backends(op, arguments[0]):
        for result in outputs(run(op, arguments, backend)):
            assert not result.isnan().any()
            assert result.is_floating_point() or bool((result < 2**31).all())


@pytest.mark.parametrize("backend", [backend for op, backend in LIVE if op == "gate"])
def test_gate_of_equal_scores_is_one(backend):
    assert ops.gate(torch.full((2, 5), 3.0, device=DEVICE), 1.0, 10.0, backend=backend).eq(1).all()


@pytest.mark.parametrize("backend", [backend for op, backend in LIVE if op == "gated_relevancy"])
def test_a_configuration_with_c_max_1_is_not_gated(backend):
    arguments = cast("gated_relevancy", TYPICAL["gated_relevancy"](), torch.float32)
    rows, _, gates = ops.gated_relevancy(*arguments, backend=backend)
    assert gates[0].eq(1).all()
    assert not gates[1].eq(1).all()
    plain = reference.relevancy(*arguments[:6])
    torch.testing.assert_close(rows[0], plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [backend for op, backend in LIVE if op == "project"])
def test_scores_are_the_sums_of_their_contributions(backend):
    arguments = cast("project", TYPICAL["project"](), torch.float32)
    scores, contributions = ops.project(*arguments, backend=backend)
    torch.testing.assert_close(scores, contributions.sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(("project", "cpp") not in LIVE, reason="the native ops are not built")
def test_features_out_of_range_are_refused():
    with pytest.raises(IndexError, match="indices: expected features from 0 to 9, got 10"):
        ops.project(randn(1, 4), randn(10, 4), randn(1, 1), torch.tensor([[10]]), backend="cpp")
