"""Every op on every backend that must be there, in every dtype, against the reference in float64.

``tests/kernels/test_triton.py`` runs this file a second time, in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfg import reference
from tests.ops import cases
from tests.ops.cases import (
    BACKENDS,
    CASES,
    HALVES,
    INTERPRETED,
    LAYOUTS,
    PAIRS,
    TYPICAL,
    cast,
    device_of,
    each,
    expanded,
    outputs,
    randn,
)
from tests.ops.compare import check, error, errors, exact, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
EXACT = [  # all backends in float32; only C++ in float64, which Triton does not have
    (case, backend, dtype)
    for backend in BACKENDS
    for case in CASES
    for dtype in TOLERANCE
    if dtype == torch.float32 or backend == "cpp"
]
FEW = settings(max_examples=8 if INTERPRETED else 25, deadline=None, derandomize=INTERPRETED)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_pair = pytest.mark.parametrize(("op", "backend"), PAIRS)


@pytest.fixture(autouse=True, scope="module")
def _poison():
    """Fill new memory with NaN (integers with the largest number).

    So a test in this file fails if a kernel does not write an element of its result.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory  # torch's default
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=cases.DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def typical(op, backend, dtype=torch.float32):
    return cast(op, TYPICAL[op](), dtype, device_of(backend))


@pytest.mark.parametrize(("case", "backend", "dtype"), EXACT, ids=str)
def test_equals_the_reference_in_float64(case, backend, dtype):
    op, build = CASES[case]
    arguments = cast(op, build(), dtype, device_of(backend))
    expected = exact(op, arguments)
    found = outputs(run(op, arguments, backend))
    assert max(errors(op, arguments, found, expected)) <= TOLERANCE[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == (dtype if theirs.is_floating_point() else theirs.dtype)
        assert theirs.is_floating_point() or dtype == torch.float32 or torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALVES)
def test_half_precision_is_no_worse_than_twice_torchs(case, dtype, backend):
    op, build = CASES[case]
    arguments = cast(op, build(), dtype, device_of(backend))
    expected = exact(op, arguments)
    torchs = errors(op, arguments, getattr(reference, op)(*arguments), expected)
    found = outputs(run(op, arguments, backend))
    # results in float32 may be products of three bfloat16 parts
    floors = [5e-5 if t.dtype == torch.float32 else torch.finfo(dtype).eps for t in found]
    for ours, theirs, floor in zip(errors(op, arguments, found, expected), torchs, floors, strict=True):
        assert ours <= 2 * theirs + floor


def sizes(*bounds):
    return st.tuples(*(st.integers(low, high) for low, high in bounds))


@st.composite
def shapes(draw, op):
    """The builder's arguments for ``op``."""
    T = (0, 9 if INTERPRETED else 40)
    if op in ("encode_topk", "project", "decode_topk"):
        T, d, F = draw(sizes(T, (1, 70), (1, 400)))
        return T, d, F, draw(st.integers(1 if op == "encode_topk" else 0, F))
    if op == "encode_project":
        return draw(st.sampled_from(cases.STREAMING)), *draw(sizes(T, (1, 70), (1, 300)))
    if op == "gate":
        return *draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.integers(1, 300))
    C, B, H, N, dh = draw(sizes((0, 20), (0, 3), (1, 3), (1, 40 if INTERPRETED else 70), (1, 48)))
    identity = draw(st.sampled_from(["transmm", "paper"]))
    if op == "relevancy":
        return C, B, H, N, dh, draw(st.booleans()), identity
    return C, B, H, N, dh, draw(st.integers(1, N)), *draw(sizes((1, 70), (1, 99), (1, 30))), identity


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[1] != "reference"])
def test_any_shape(op, backend):
    @given(shapes(op))
    @FEW
    def draw(shape):
        check(op, cast(op, getattr(cases, op)(*shape), torch.float32, device_of(backend)), backend)

    draw()


# NaN, infinity and ties ---------------------------------------------------------------------------------------------


@every_pair
def test_nan_stays_in_its_own_token_or_image(op, backend):
    """A NaN in the second token (or image) appears in that token's part of the result, and in no other part."""
    arguments = list(typical(op, backend))
    where = {"relevancy": 1, "gated_relevancy": 6}.get(op, 0)  # q; g; the first
    arguments[where][1].view(-1)[5] = torch.nan
    found = outputs(run(op, arguments, backend))
    if op != "encode_topk":
        errors(op, arguments, found, exact(op, arguments))  # NaN exactly where the reference has it
    for result in found if op == "gated_relevancy" else found[:1]:
        images = result.transpose(0, 1) if "relevancy" in op and len(result) == 3 else result
        assert images[1].isnan().any()
        assert not images[0].isnan().any()


@every_backend
def test_project_is_nan_where_its_codes_are(backend):
    arguments = typical("project", backend)
    arguments[2][2, 3] = torch.nan
    scores, contributions = check("project", arguments, backend)
    assert scores.isnan().nonzero().tolist() == [[2]]
    assert contributions.isnan().nonzero().tolist() == [[2, 3]]


@every_backend
def test_rows_that_are_not_gated_do_not_see_nan_scores(backend):
    arguments = typical("gated_relevancy", backend)
    arguments[8][1, 3, 2] = torch.nan
    rows, scores, gates = check("gated_relevancy", arguments, backend)
    assert scores.isnan().nonzero().tolist() == [[1, 3]]
    assert gates[1:, 1].isnan().all()
    assert gates[0].eq(1).all()
    assert rows[:, 0].isfinite().all()
    torch.testing.assert_close(rows[0], reference.relevancy(*arguments[:6])[0], rtol=1e-5, atol=1e-5)


@every_backend
def test_nan_pre_activations_are_chosen_first(backend):
    """NaN is greater than any number, as in torch's sort."""
    given = cases.encode_topk(3, 33, 300, 13)
    x, _, b_enc, _, _ = arguments = cast("encode_topk", given, torch.float32, device_of(backend))
    b_enc[41] = torch.nan
    values, indices = run("encode_topk", arguments, backend)
    expected = exact("encode_topk", arguments)
    assert torch.equal(indices, expected[1])
    assert error(values, expected[0]) <= 1e-5
    x[1, 2] = torch.nan
    values, indices = run("encode_topk", arguments, backend)
    assert values[1].isnan().all()


@every_backend
def test_a_nan_among_ties_is_chosen_first(backend):
    b_enc = torch.tensor([1.0, torch.nan, 1.0, 1.0])
    arguments = cast(
        "encode_topk", (torch.zeros(1, 2), torch.zeros(2, 4), b_enc, None, 2), torch.float32, device_of(backend)
    )
    values, indices = run("encode_topk", arguments, backend)
    assert indices.tolist() == [[1, 0]]
    assert values.isnan().tolist() == [[True, False]]


@every_backend
def test_negative_and_signed_zero_pre_activations(backend):
    """Negative values become 0. -0.0 equals 0.0, so the lowest index comes first."""
    b_enc = torch.tensor([-1.0, -0.0, 0.0, -2.0, -0.0, -1.0])
    arguments = (randn(2, 16), torch.zeros(16, 6), b_enc, None, 5)
    values, indices = run("encode_topk", cast("encode_topk", arguments, torch.float32, device_of(backend)), backend)
    assert indices.tolist() == [[1, 2, 4, 0, 5]] * 2
    assert values.tolist() == [[0.0] * 5] * 2


@every_backend
def test_topk_ties_go_to_the_lowest_index(backend):
    """Whole numbers, so that every sum is exact and ties are everywhere."""

    @given(st.integers(0, 2**32 - 1), st.integers(1, 5 if INTERPRETED else 40), st.integers(2, 700), st.integers(1, 4))
    @FEW
    def draw(seed, T, F, levels):
        random = torch.Generator().manual_seed(seed)
        x = torch.randint(-1, 2, (T, 3), generator=random).float().to(device_of(backend))
        W_enc = torch.randint(-levels, levels + 1, (3, F), generator=random).float().to(x)
        k = int(torch.randint(1, F + 1, (), generator=random))
        expected = (x @ W_enc).sort(dim=-1, descending=True, stable=True)
        values, indices = run("encode_topk", (x, W_enc, torch.zeros(F).to(x), None, k), backend)
        assert torch.equal(values, expected.values[:, :k].relu())
        assert torch.equal(indices, expected.indices[:, :k])

    draw()


@every_backend
@pytest.mark.parametrize(
    "scores",
    [
        [2.0, 2.0, 2.0, 2.0],  # MAD 0
        [2.0, 2.0, 2.0, 3.0],
        [-0.0, 0.0, 1.0, -1.0],
        [1e-30, -1e-30, 1e-38, 0.0],
        [1.0, torch.inf, 2.0, -torch.inf, 3.0],
        [torch.inf, torch.inf, torch.inf, 1.0],
        [1.0, torch.nan, 2.0],
        [torch.nan] * 3,
    ],
    ids=str,
)
def test_gates_of_odd_scores(scores, backend):
    arguments = (torch.tensor([scores, [1.0] * len(scores)], device=device_of(backend)), 1.0, 5.0)
    (gates,) = check("gate", arguments, backend)
    assert gates[1].eq(1).all()


@every_backend
@pytest.mark.parametrize("odd", [0, 1])
def test_gated_relevancy_of_equal_scores(odd, backend):
    """The MAD is 0: equal scores have gate 1, and the different one has the largest or the smallest gate."""
    arguments = list(typical("gated_relevancy", backend))
    for i in (6, 8, 9):
        arguments[i] = arguments[i][:, :1].expand_as(arguments[i]).clone()
    arguments[8][:, :odd] *= 2
    _, _, gates = check("gated_relevancy", arguments, backend)
    assert torch.equal(gates[..., odd:], torch.ones_like(gates[..., odd:]))
    for c, c_max in enumerate(arguments[11].tolist()):
        for one in gates[c, :, :odd].flatten().tolist():
            assert one == pytest.approx(c_max, rel=1e-5) or one == pytest.approx(1 / c_max, rel=1e-5)


@every_backend
def test_attention_logits_that_overflow_an_exponential(backend):
    arguments = list(typical("relevancy", backend))
    arguments[1] = 40 * arguments[1]
    check("relevancy", arguments, backend, 1e-4)  # float32 logits near 100 have an error of 1e-5


# Memory -------------------------------------------------------------------------------------------------------------


@every_pair
def test_results_repeat(op, backend):
    arguments = typical(op, backend)
    once, again = (outputs(run(op, arguments, backend)) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_pair
def test_memory_layout_does_not_matter(op, backend, layout):
    arguments = typical(op, backend)
    plain, other = (outputs(run(op, given, backend)) for given in (arguments, each(arguments, LAYOUTS[layout])))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_pair
def test_arguments_may_be_views_of_one_anothers_memory(op, backend):
    views = each(typical(op, backend), expanded)
    found = outputs(run(op, views, backend))
    for a, b in zip(found, outputs(run(op, each(views, lambda _, t: t.contiguous()), backend)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Relations between results ------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("C", [1, 3])
def test_a_configuration_with_c_max_1_is_not_gated(C, backend):
    arguments = list(typical("gated_relevancy", backend))
    arguments[0], arguments[10], arguments[11] = (arguments[i][:C] for i in (0, 10, 11))
    assert arguments[11][0] == 1
    rows, _, gates = check("gated_relevancy", arguments, backend)
    assert gates[0].eq(1).all()
    assert C == 1 or not gates[1].eq(1).all()
    plain = run("relevancy", (*arguments[:6], None, "transmm"), backend)
    torch.testing.assert_close(rows[0], plain[0], rtol=1e-5, atol=1e-5)


@every_backend
def test_gated_relevancy_equals_its_parts(backend):
    rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max, identity = typical("gated_relevancy", backend)
    codes = (g.flatten(0, 1), W_dec, values.flatten(0, 1), indices.flatten(0, 1))
    scores = run("project", codes, backend)[0].unflatten(0, g.shape[:2])
    gates = run("gate", (scores, kappa[:, None, None], c_max[:, None, None]), backend)
    every = torch.cat([torch.ones_like(gates[..., :1]), gates], -1)
    parts = (run("relevancy", (rows, q, k, v, dO, scale, every, identity), backend), scores, gates)
    found = run("gated_relevancy", typical("gated_relevancy", backend), backend)
    for ours, theirs in zip(found, parts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_backend
def test_scores_are_the_sums_of_their_contributions(backend):
    scores, contributions = run("project", typical("project", backend), backend)
    torch.testing.assert_close(scores, contributions.sum(-1), rtol=1e-5, atol=1e-5)
