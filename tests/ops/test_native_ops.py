"""The native ops called directly: the arguments that they refuse, edge sizes, and torch's modes."""

import pytest
import torch

from fastfg import reference
from tests.ops.native_cases import BUILD, Draw, judge, run


def typical(op):
    """Arguments without an empty dimension."""
    for seed in range(200):
        arguments = BUILD[op](Draw(seed))
        tensors = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        if all((t.numel() and max(t.shape) > 3) or not t.ndim for t in tensors):
            return arguments
    raise AssertionError(f"no typical arguments of {op}")


def topk(b_enc, k, T=2):
    """Values and indices for the first token, as lists, from the native op with pre-activations ``b_enc``."""
    b_enc = torch.tensor(b_enc)
    values, indices = torch.ops.fastfg.encode_topk(torch.zeros(T, 2), torch.zeros(2, len(b_enc)), b_enc, None, k)
    assert torch.equal(indices, indices[:1].expand(T, k))
    return values[0].tolist(), indices[0].tolist()


INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    ("b_enc", "k", "indices"),
    [
        ([-INF] * 40, 3, [0, 1, 2]),
        ([-INF] * 20 + [1.0] + [-INF] * 20, 3, [20, 0, 1]),
        ([-INF, 2.0, -INF, 3.0], 4, [3, 1, 0, 2]),
        ([5.0] * 50, 4, [0, 1, 2, 3]),
        ([INF, INF, 1.0, INF], 2, [0, 1]),
        ([1.0, NAN, 2.0, NAN, INF, NAN], 2, [1, 3]),
        ([NAN] * 40, 3, [0, 1, 2]),
        ([-INF] * 20 + [NAN], 2, [20, 0]),
        ([-1.0], 1, [0]),
    ],
)
def test_topk_takes_the_lowest_index_among_equals(b_enc, k, indices):
    expected = torch.tensor(b_enc)[indices].relu().tolist()
    found, chosen = topk(b_enc, k)
    assert chosen == indices
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    found, chosen = reference.encode_topk(torch.zeros(1, 2), torch.zeros(2, len(b_enc)), torch.tensor(b_enc), None, k)
    assert chosen[0].tolist() == indices
    torch.testing.assert_close(found[0].tolist(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("scores", "nan"),
    [([1.0, NAN, 2.0], True), ([INF, INF, 1.0], True), ([1.0, 2.0, INF], False), ([-INF, 0.0, 1.0, INF], False)],
)
def test_gates_of_scores_that_are_not_finite(scores, nan):
    """Deviations from an infinite median are not defined: every gate is NaN, as in the reference."""
    s, one = torch.tensor([scores]), torch.ones(1)
    found, expected = torch.ops.fastfg.gate(s, one, 10 * one), reference.gate(s, 1.0, 10.0)
    assert bool(found.isnan().all()) == nan
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("size", ["C", "B", "N", "dh"])
def test_relevancy_at_size_zero(size):
    C, B, N, dh = (0 if letter == size else 3 for letter in ("C", "B", "N", "dh"))
    rows, attention = torch.randn(C, B, N), torch.randn(4, B, 2, N, dh)
    for gates in (None, torch.rand(C, B, N)):
        found = torch.ops.fastfg.relevancy(rows, *attention, 0.3, gates, True)
        torch.testing.assert_close(found, reference.relevancy(rows, *attention, 0.3, gates, "paper"))


def test_relevancy_of_a_negative_scale():
    rows, attention = torch.randn(1, 1, 5), 40 * torch.randn(4, 1, 1, 5, 8)
    found = torch.ops.fastfg.relevancy(rows, *attention, -1.0, None, False)
    torch.testing.assert_close(found, reference.relevancy(rows, *attention, -1.0))


# Refused arguments ---------------------------------------------------------------------------------------------------

WRONG = [  # op, argument, what it becomes, error, message
    ("encode_topk", "x", torch.zeros(3, 5), "x: expected [T, 2] (T d), got [3, 5]"),
    ("encode_topk", "b_enc", torch.zeros(8), "b_enc: expected [9] (F), got [8]"),
    ("encode_topk", "b_dec", torch.zeros(1), "b_dec: expected [2] (d), got [1]"),
    (
        "encode_topk",
        "W_enc",
        torch.zeros(2, 9).long(),
        "W_enc: expected float16, bfloat16, float32 or float64, got Long",
    ),
    ("encode_topk", "k", 10, "k: expected 1 to 9, got 10"),
    ("encode_topk", "k", 0, "k: expected 1 to 9, got 0"),
    ("encode_project", "W_dec", torch.zeros(2, 9), "W_dec: expected [9, 2] (F d), got [2, 9]"),
    ("encode_project", "activation", "topk", "activation: expected one that acts on each feature alone, got 'topk'"),
    ("encode_project", "threshold", None, "threshold: expected [9] (F) or a number for 'jumprelu', got None"),
    ("encode_project", "threshold", torch.zeros(8), "threshold: expected [9] (F) or a number, got [8]"),
    ("gate", "scores", torch.zeros(3, 0), "scores: expected [rows, P] with at least one patch, got [3, 0]"),
    ("gate", "kappa", torch.ones(2), "kappa: expected [3] (rows), got [2]"),
    ("gate", "c_max", torch.ones(3).double(), "c_max: expected Float, as scores, got Double"),
    ("gate", "scores", torch.zeros(3, 4).half(), "scores: expected float32 or float64, got Half"),
    ("project", "g", torch.zeros(3), "g: expected [T, d] (T d), got [3]"),
    ("project", "values", torch.zeros(4, 2), "values: expected [3, K] (T K), got [4, 2]"),
    ("project", "indices", torch.zeros(3, 1).long(), "indices: expected [3, 2] (T K), got [3, 1]"),
    ("project", "indices", torch.zeros(3, 2), "indices: expected int64 or int32, got Float"),
    ("project", "indices", torch.tensor([[0, 1], [2, -1], [0, 0]]), "indices: expected features from 0 to 8, got -1"),
    ("project", "indices", torch.tensor([[0, 1], [2, 9], [0, 0]]), "indices: expected features from 0 to 8, got 9"),
    ("decode_topk", "values", torch.zeros(3), "values: expected [T, K] (T K), got [3]"),
    ("decode_topk", "b_dec", torch.zeros(3), "b_dec: expected [2] (d), got [3]"),
    ("decode_topk", "indices", torch.tensor([[0, 1], [2, 9], [0, 0]]), "indices: expected features from 0 to 8, got 9"),
    ("relevancy", "rows", torch.zeros(1, 2, 4).half(), "rows: expected float32 or float64, got Half"),
    ("relevancy", "dO", torch.zeros(2, 1, 3, 4), "dO: expected [2, 1, 4, 4] (B H N dh), got [2, 1, 3, 4]"),
    ("relevancy", "gates", torch.zeros(2, 4), "gates: expected [1, 2, 4] (C B N), got [2, 4]"),
    ("gated_relevancy", "g", torch.zeros(2, 5, 3), "g: expected 1 to 4 patches, the last of rows' tokens, got 5"),
    ("gated_relevancy", "g", torch.zeros(2, 0, 3), "g: expected 1 to 4 patches, the last of rows' tokens, got 0"),
    ("gated_relevancy", "c_max", torch.ones(2), "c_max: expected [1] (C), got [2]"),
    ("gated_relevancy", "k", torch.zeros(2, 2, 4, 4), "k: expected [2, 1, 4, 4] (B H N dh), got [2, 2, 4, 4]"),
]


def small(op, P):
    """Arguments of known sizes: T = 3, d = 2, F = 9, K = 2; C = 1, B = 2, H = 1, N = 4, dh = 4."""
    W_enc, b_enc, W_dec = torch.randn(2, 9), torch.randn(9), torch.randn(9, 2)
    streaming = {"activation": "jumprelu", "threshold": b_enc, "r_mag": None, "b_gate": None, "b_mag": None}
    x = {"x": torch.randn(3, 2)}
    codes = {"values": torch.ones(3, 2), "indices": torch.ones(3, 2).long()}
    block = {"rows": torch.ones(1, 2, 4), **{name: torch.randn(2, 1, 4, 4) for name in ("q", "k", "v", "dO")}}
    patches = {"g": torch.randn(2, P, 3), "W_dec": torch.randn(9, 3)}
    sparse = {"values": torch.ones(2, P, 2), "indices": torch.ones(2, P, 2).long()}
    gate = {"kappa": torch.ones(1), "c_max": 5 * torch.ones(1), "paper": False}
    return {
        "encode_topk": {**x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": torch.zeros(2), "k": 4},
        "encode_project": {**x, "g": torch.randn(3, 2), "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, **streaming},
        "gate": {"scores": torch.randn(3, 4), "kappa": torch.ones(3), "c_max": 5 * torch.ones(3)},
        "project": {"g": torch.randn(3, 2), "W_dec": W_dec, **codes},
        "decode_topk": {**codes, "W_dec": W_dec, "b_dec": torch.zeros(2)},
        "relevancy": {**block, "scale": 1.0, "gates": None, "paper": False},
        "gated_relevancy": {**block, "scale": 1.0, **patches, **sparse, **gate},
    }[op]


@pytest.mark.parametrize(("op", "name", "value", "message"), WRONG, ids=[f"{w[0]} {w[3]}" for w in WRONG])
def test_a_wrong_argument_is_named(op, name, value, message):
    patches = value.shape[1] if op == "gated_relevancy" and name == "g" else 3
    arguments = small(op, patches)
    run(op, small(op, 3))
    kind = IndexError if "features from" in message else ValueError
    with pytest.raises(kind) as raised:
        run(op, {**arguments, name: value})
    assert str(raised.value) == message


# Torch's modes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def requires_grad(arguments):
    def one(value):
        return (
            value.detach().clone().requires_grad_()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )

    return {name: one(value) for name, value in arguments.items()}


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("op", BUILD)
def test_results_are_the_same_in_every_mode(op, mode):
    arguments = small(op, 3)  # two images, one per thread
    expected = run(op, arguments)
    with mode():
        tracked = requires_grad(arguments)
        found = [t for given in (arguments, tracked) for t in run(op, given)]
    for ours, theirs in zip(found, [*expected, *expected], strict=True):
        assert torch.equal(ours, theirs)
    with torch.inference_mode():
        made_inside = {n: a.clone() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    for ours, theirs in zip(run(op, made_inside), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", BUILD)
def test_a_derivative_is_refused_and_never_left_out(op):
    result = run(op, requires_grad(small(op, 3)))[0]
    assert result.requires_grad
    with pytest.raises(RuntimeError, match=f"derivative for fastfg::{op} is not implemented"):
        result.sum().backward()


@pytest.mark.parametrize("op", BUILD)
def test_expanded_inputs(op):
    arguments = typical(op)
    first = {n: a[:1].expand_as(a) if isinstance(a, torch.Tensor) and a.ndim else a for n, a in arguments.items()}
    copies = {n: a.contiguous() if isinstance(a, torch.Tensor) else a for n, a in first.items()}
    for expanded, plain, exact in zip(run(op, first), run(op, copies), judge(op, copies), strict=True):
        torch.testing.assert_close(expanded, plain, rtol=1e-5, atol=1e-5)
        assert expanded.shape == exact.shape
