"""``adam_topk`` on every backend against the reference in float64. It changes the weights and the moments.

``tests/kernels/test_triton.py`` runs this file a second time, in Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F

from fastfg import ops, reference
from tests.ops.cases import BACKENDS, cast, device_of, randn

STATE = ("weights", "m", "v")
CASES = [  # T, d, F, K, J
    (9, 33, 40, 5, None),
    (9, 33, 40, 5, 3),
    (49, 16, 300, 13, 0),
    (7, 64, 20, 20, 7),
    (3, 33, 100, 0, None),
    (0, 33, 10, 5, 2),
    (5, 1, 1, 1, None),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments(T=9, d=33, n_features=40, K=5, J=3, seed=0):
    """In float64. Some codes are 0, and a token may have the same feature twice."""

    def codes(K, seed):
        indices = torch.randint(n_features, (T, K), generator=torch.Generator().manual_seed(seed))
        return randn(T, d, seed=seed + 1), randn(T, K, seed=seed + 2).relu(), indices

    g, values, indices = codes(K, 100 * seed)
    shapes = ((n_features, d), (n_features,), (n_features, d))
    weights, m, v = ([randn(*s, seed=100 * seed + 10 * i + j) for j, s in enumerate(shapes)] for i in (3, 4, 5))
    weights[2] = F.normalize(weights[2], dim=1)
    state = [[tensors[0].mT, *tensors[1:]] for tensors in (weights, m, [t.square() for t in v])]
    return {
        "x": randn(T, d, seed=100 * seed + 9),
        "g": g,
        "values": values,
        "indices": indices,
        "aux": None if J is None else codes(J, 100 * seed + 50),
        **dict(zip(STATE, state, strict=True)),
    }


def on(backend, given, dtype=torch.float32):
    """A copy in ``dtype`` on the backend's device."""

    def one(value):
        if isinstance(value, torch.Tensor):
            # cloned with its layout: the encoder's columns are contiguous
            return cast("adam_topk", (value,), dtype, device_of(backend))[0].clone()
        return value if value is None else type(value)(map(one, value))

    return {name: one(value) for name, value in given.items()}


def judge(given, **options):
    """The reference in float64 on a copy. Returns the results and the changed state."""
    given = on("reference", given, torch.float64)
    found = ops.adam_topk(**given, **options, backend="reference")
    return found, [given[name] for name in STATE]


def compare(given, found, expected, state, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double().cpu(), theirs.double().cpu(), rtol=tolerance, atol=tolerance)
    for name, tensors in zip(STATE, state, strict=True):
        for ours, theirs in zip(given[name], tensors, strict=True):
            torch.testing.assert_close(ours.double().cpu(), theirs.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
@every_backend
def test_equals_the_reference_in_float64(backend, case, unit_norm):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12))[: 1 if backend == "triton" else 2]:
        given = on(backend, arguments(*case), dtype)
        options = {"lr": 0.01, "step": 3, "betas": (0.8, 0.99), "eps": 1e-6, "unit_norm": unit_norm}
        expected, state = judge(given, **options)
        kept = {name: given[name].clone() for name in ("x", "g", "values", "indices")}
        found = ops.adam_topk(**given, **options, backend=backend)
        compare(given, found, expected, state, tolerance)
        assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())
        assert found[1].dtype == torch.int32


@every_backend
def test_counts_by_hand(backend):
    """Feature 0 is active in both tokens, feature 1 in one, feature 2 in the auxiliary codes alone."""
    codes = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0, 1], [0, 1]])
    aux = torch.ones(2, 4), torch.ones(2, 1), torch.full((2, 1), 2)
    state = [[torch.ones(3, 4).mT, torch.ones(3), torch.ones(3, 4)] for _ in STATE]
    given = {"x": torch.ones(2, 4), "g": torch.ones(2, 4), "values": codes[0], "indices": codes[1], "aux": aux}
    given = on(backend, given | dict(zip(STATE, state, strict=True)))
    of_input, counts = ops.adam_topk(**given, lr=0.1, step=1, betas=(0.0, 0.0), backend=backend)
    assert counts.tolist() == [2, 1, 0]
    assert of_input.tolist() == [20.0] * 4  # five pairs with a gradient of 4 at the code, and weights of 1
    # without momentum, the first moment is the gradient; the part along the row is all of the decoder's
    assert given["m"][1].tolist() == [8.0, 4.0, 8.0]
    assert given["m"][0].mT[:, 0].tolist() == [8.0, 4.0, 8.0]


@every_backend
def test_rows_without_codes_move_by_their_moments_alone(backend):
    given = on(backend, arguments())
    given["values"].zero_()
    given["aux"][1].zero_()
    before = [w.clone() for w in given["weights"]]
    ops.adam_topk(**given, lr=0.01, step=2, unit_norm=False, backend=backend)
    theirs = [w.clone().requires_grad_() for w in before]
    m, v = arguments()["m"], arguments()["v"]
    for ours, other, first, second in zip(given["weights"], theirs, m, v, strict=True):
        root = (0.999 * second).sqrt() / (1 - 0.999**2) ** 0.5 + 1e-8
        expected = other.detach().double().cpu() - 0.01 / (1 - 0.9**2) * 0.9 * first / root
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@every_backend
def test_nan_stays_in_its_features(backend):
    given = on(backend, arguments(J=None))
    given["g"][2] = torch.nan
    ops.adam_topk(**given, lr=0.01, step=1, backend=backend)
    active = given["indices"][2][given["values"][2] > 0].unique()
    assert sorted(active.tolist()) == given["weights"][2].isnan().any(1).nonzero().flatten().tolist()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="runs with the native ops")
@pytest.mark.parametrize("n", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(n):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, n):
            torch.set_num_threads(threads)
            given = on("cpp", arguments(300, 33, 200, 40, 9))
            found = ops.adam_topk(**given, lr=0.01, step=1, backend="cpp")
            results.append([*found, *(t for name in STATE for t in given[name])])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@every_backend
def test_weights_may_require_gradients(backend):
    given = on(backend, arguments())
    for weight in given["weights"]:
        weight.requires_grad_()
    kept = given["weights"][2].detach().clone()
    ops.adam_topk(**given, lr=0.01, step=1, backend=backend)
    assert given["weights"][2].requires_grad
    assert not torch.equal(given["weights"][2], kept)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "triton"])
@pytest.mark.parametrize("index", [-1, 40])
@pytest.mark.parametrize("name", ["indices", "aux_indices"])
def test_an_index_out_of_range(backend, name, index):
    given = on(backend, arguments())
    (given["indices"] if name == "indices" else given["aux"][2])[3, 1] = index
    kept = [t.clone() for part in STATE for t in given[part]]
    with pytest.raises(IndexError, match=f"^{name}: expected features from 0 to 39, got {index}"):
        ops.adam_topk(**given, lr=0.01, step=1, backend=backend)
    assert all(map(torch.equal, kept, (t for part in STATE for t in given[part])))


WRONG = [
    ("g", randn(8, 33), r"g: expected \[9, 33\] \(T d\), got \[8, 33\]"),
    ("indices", torch.zeros(9, 4).long(), r"indices: expected \[9, 5\] \(T K\), got \[9, 4\]"),
    ("aux", (randn(9, 32), randn(9, 3), torch.zeros(9, 3).long()), r"aux_g: expected \[9, 33\] \(T d\), got"),
    ("weights", [randn(33, 40)], r"weights: expected \[W_enc, b_enc, W_dec\], got 1 tensors"),
    ("weights", [randn(33, 40), randn(40), randn(40, 33)], "weights, W_enc: expected contiguous columns, got strides"),
    ("m", [randn(40, 33).mT, randn(39), randn(40, 33)], r"m, b_enc: expected \[40\] \(F\), got \[39\]"),
    ("v", [randn(40, 33).mT, randn(40), randn(40, 33).half()], "v, W_dec: expected torch.float64, as x, got torch.f"),
    ("step", 0, "step: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_are_named(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.adam_topk(**({"lr": 0.01, "step": 1} | arguments() | {name: value}))


def test_the_reference_is_the_public_op():
    given = on("reference", arguments(), torch.float64)
    flat = [given[name] for name in ("x", "g", "values", "indices")]
    again = on("reference", arguments(), torch.float64)
    ops.adam_topk(**given, lr=0.01, step=1, backend="reference")
    reference.adam_topk(*flat, *again["aux"], *(again[name] for name in STATE), 0.01, 0.9, 0.999, 1e-8, 1, True)
    assert torch.equal(given["weights"][0], again["weights"][0])
