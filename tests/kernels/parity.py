"""The Triton kernels against the float64 reference: on a GPU where there is one, else in Triton's interpreter.

``test_triton.py`` runs this file and its siblings; ``pytest --noconftest tests/kernels/parity.py`` does so by hand.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastfg import reference
from tests.kernels.tools import (
    DEVICE,
    HALVES,
    activation,
    block,
    check,
    check_topk,
    codes,
    draw,
    encoder,
    error,
    launch,
    poisoned,  # noqa: F401
    widen,
)

# isort: split
from fastfg.kernels import encode_project, encode_topk, gate, project, relevancy

ACTIVATIONS = ("relu", "tanh_relu", "jumprelu", "batch_topk", "gated")

# relevancy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("C", [1, 3, 17])
@pytest.mark.parametrize(("N", "dh"), [(5, 32), (50, 48), (50, 33)])
def test_relevancy(C, N, dh, identity):
    check(relevancy.relevancy, reference.relevancy, *block(C, N, dh), identity)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_relevancy_of_a_real_length(C, dtype):
    check(relevancy.relevancy, reference.relevancy, *block(C, 197, 64, B=1, dtype=dtype))


@pytest.mark.parametrize("C", [1, 3])
def test_relevancy_of_heads_that_are_not_split(C, monkeypatch):
    monkeypatch.setattr(relevancy, "PROGRAMS", 1)
    check(relevancy.relevancy, reference.relevancy, *block(C, 50, 32), "paper")


def test_relevancy_without_gates():
    rows, q, k, v, dO, scale, _ = block(2, 50, 32)
    check(relevancy.relevancy, reference.relevancy, rows, q, k, v, dO, scale)


def test_relevancy_takes_the_log_sum_exp_that_a_model_kept():
    rows, q, k, v, dO, scale, gates = block(1, 50, 32)
    lse = torch.logsumexp(q @ k.mT * scale, -1)
    got = launch(relevancy.relevancy, rows, q, k, v, dO, scale, gates, lse=lse)
    torch.testing.assert_close(got, launch(relevancy.relevancy, rows, q, k, v, dO, scale, gates), rtol=1e-5, atol=1e-5)


def test_relevancy_with_logits_that_overflow_an_exponential():
    rows, q, k, v, dO, scale, gates = block(1, 50, 32)
    got = launch(relevancy.relevancy, rows, 40 * q, k, v, dO, scale, gates)
    exact = reference.relevancy(*map(widen, (rows, 40 * q, k, v, dO)), scale, widen(gates))
    assert error(got, exact) < 1e-4  # of logits near 100, float32 keeps 1e-5


def test_relevancy_is_nan_where_its_input_is():
    rows, q, k, v, dO, scale, gates = block(3, 50, 32)
    q = q.clone()
    q[1, 0, 7, 3] = float("nan")
    got = check(relevancy.relevancy, reference.relevancy, rows, q, k, v, dO, scale, gates)
    assert got[:, 1].isnan().all()
    assert got[:, 0].isfinite().all()


@pytest.mark.parametrize(("C", "B"), [(0, 2), (1, 0)])
def test_relevancy_of_nothing(C, B):
    assert launch(relevancy.relevancy, *block(C, 5, 32, B=B)).shape == (C, B, 5)


# project --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "d", "F", "K"), [(1, 33, 300, 13), (49, 192, 301, 1), (5, 300, 77, 77), (57, 33, 50, 13)]
)
def test_project(T, d, F, K):
    check(project.project, reference.project, draw(T, d), draw(F, d, seed=1), *codes(T, F, K))


@pytest.mark.parametrize("dtype", HALVES)
def test_project_of_narrow_numbers(dtype):
    check(
        project.project,
        reference.project,
        draw(49, 192, dtype=dtype),
        draw(300, 192, dtype=dtype),
        *codes(49, 300, 13, dtype),
    )


def test_project_of_strided_inputs():
    values, indices = codes(49, 300, 13)
    g, W_dec = draw(33, 49).T, draw(33, 300, seed=1).T
    check(project.project, reference.project, g, W_dec, values.T.contiguous().T, indices.T.contiguous().T)


def test_project_is_nan_where_its_input_is():
    values, indices = codes(5, 300, 13)
    values[2, 3] = float("nan")
    scores, contributions = check(project.project, reference.project, draw(5, 33), draw(300, 33), values, indices)
    assert scores.isnan().nonzero().tolist() == [[2]]
    assert contributions.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("index", [-1, 300, -(2**40), 2**40])
def test_project_is_nan_for_a_feature_that_the_decoder_lacks(index):
    """Its row is not read; it would be outside of memory."""
    values, indices = codes(5, 300, 13)
    g, W_dec = draw(5, 33), draw(300, 33, seed=1)
    expected_scores, expected = project.project(g, W_dec, values, indices)
    indices[2, 3] = index
    scores, contributions = project.project(g, W_dec, values, indices)
    assert scores.isnan().nonzero().tolist() == [[2]]
    assert contributions.isnan().nonzero().tolist() == [[2, 3]]
    expected[2, 3], expected_scores[2] = torch.nan, torch.nan
    torch.testing.assert_close(contributions, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=0, equal_nan=True)


def test_project_of_nothing():
    scores, contributions = project.project(draw(0, 33), draw(300, 33), *codes(0, 300, 13))
    assert (scores.shape, contributions.shape) == ((0,), (0, 13))
    scores, contributions = project.project(draw(3, 33), draw(300, 33), *codes(3, 300, 0))
    assert (scores.tolist(), contributions.shape) == ([0, 0, 0], (3, 0))


# gate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [1, 2, 49, 50, 196, 1369])
def test_gate(P):
    check(gate.gate, reference.gate, draw(3, P), 0.7, 5.0)


@pytest.mark.parametrize("dtype", HALVES)
def test_gate_of_narrow_numbers(dtype):
    check(gate.gate, reference.gate, draw(3, 50, dtype=dtype), 0.7, 5.0)


def test_gate_of_several_configurations():
    kappa, c_max = draw(4, 1, 1).exp(), draw(4, 1, 1, seed=1).exp()
    check(gate.gate, reference.gate, draw(2, 50), kappa, c_max)
    check(gate.gate, reference.gate, draw(4, 2, 50).transpose(0, 1), 0.7, draw(2, 1, 1, seed=1).exp())
    one = torch.full((1, 1, 1), 0.7, device=DEVICE)  # for all images, as one number in memory
    check(gate.gate, reference.gate, draw(1, 3, 50), one, one.expand(1, 3, 1))


@pytest.mark.parametrize(
    "scores",
    [
        [2.0, 2.0, 2.0, 2.0],  # MAD 0
        [2.0, 2.0, 2.0, 3.0],
        [-0.0, 0.0, 1.0, -1.0],
        [1e-30, -1e-30, 1e-38, 0.0],
        [1.0, float("inf"), 2.0, float("-inf"), 3.0],
        [float("inf"), float("inf"), float("inf"), 1.0],
        [1.0, float("nan"), 2.0],
        [float("nan")] * 3,
    ],
)
def test_gate_of_odd_scores(scores):
    check(gate.gate, reference.gate, torch.tensor([scores, [1.0] * len(scores)], device=DEVICE), 1.0, 5.0)


def test_gate_of_nothing():
    assert launch(gate.gate, draw(0, 50), 1.0, 5.0).shape == (0, 50)


# encode_topk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "d", "F", "k"), [(1, 33, 300, 13), (49, 192, 70, 1), (5, 33, 1501, 13), (3, 33, 100, 100)]
)
def test_encode_topk(T, d, F, k):
    check_topk(encode_topk.encode_topk, *encoder(T, d, F), k)


@pytest.mark.parametrize("dtype", HALVES)
def test_encode_topk_of_narrow_numbers(dtype):
    check_topk(encode_topk.encode_topk, *encoder(5, 192, 501, dtype), 13)


@pytest.mark.parametrize("dtype", HALVES)
def test_encode_topk_of_an_sae_with_float32_biases(dtype):
    x, W_enc, b_enc, b_dec = encoder(5, 192, 501, dtype)
    values, indices = encode_topk.encode_topk(x, W_enc, b_enc.float(), b_dec.float(), 13)
    assert values.dtype == dtype
    expected = encode_topk.encode_topk(x, W_enc, b_enc, b_dec, 13)  # the same numbers
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_encode_topk_of_strided_inputs():
    x, W_enc, b_enc, _ = encoder(5, 33, 300)
    check_topk(
        encode_topk.encode_topk,
        x.T.contiguous().T,
        W_enc.T.contiguous().T,
        torch.stack([b_enc, b_enc], 1)[:, 0],
        None,
        13,
    )


@pytest.mark.parametrize("k", [1, 20, 200])
@pytest.mark.parametrize("order", ["none", "by index", "as visited"])
def test_encode_topk_ties_go_to_the_lowest_index(order, k):
    """Whole numbers, so that every sum is exact; rising as tiles are visited, so that lists overflow."""
    T, d, F, BLOCK_F = 3, 16, 1500, 64
    tiles = -(-F // BLOCK_F)
    turn = torch.empty(tiles, dtype=torch.long)
    turn[torch.arange(tiles) * encode_topk.spread(tiles) % tiles] = torch.arange(tiles)
    rank = turn[torch.arange(F) // BLOCK_F] if order == "as visited" else torch.arange(F) // 7
    x = torch.ones(T, d, device=DEVICE)
    x[1] = 0  # of this token all are equal where nothing rises
    W_enc = draw(d, F).round()
    b_enc = torch.zeros(F, device=DEVICE) if order == "none" else 50.0 * rank.to(DEVICE)
    values, indices = encode_topk.encode_topk(x, W_enc, b_enc, None, k)
    expected = reference.encode_topk(x.double(), W_enc.double(), b_enc.double(), None, k)
    assert torch.equal(values.double(), expected[0])
    assert torch.equal(indices, expected[1])


def test_encode_topk_of_negative_and_signed_zero_values():
    b_enc = torch.tensor([-1.0, -0.0, 0.0, -2.0, -0.0, -1.0], device=DEVICE)
    values, indices = encode_topk.encode_topk(draw(2, 16), torch.zeros(16, 6, device=DEVICE), b_enc, None, 5)
    assert indices.tolist() == [[1, 2, 4, 0, 5]] * 2
    assert values.tolist() == [[0.0] * 5] * 2


def test_encode_topk_is_nan_where_its_input_is():
    x, W_enc, b_enc, b_dec = encoder(3, 33, 300)
    b_enc[41] = float("nan")
    values, indices = encode_topk.encode_topk(x, W_enc, b_enc, b_dec, 13)
    expected = reference.encode_topk(x, W_enc, b_enc, b_dec, 13)
    assert torch.equal(indices, expected[1])
    assert error(values, expected[0]) < 1e-5
    x[1, 2] = float("nan")
    assert encode_topk.encode_topk(x, W_enc, b_enc, b_dec, 13)[0][1].isnan().all()


def test_encode_topk_of_no_tokens():
    values, indices = encode_topk.encode_topk(*encoder(0, 33, 300), 13)
    assert values.shape == indices.shape == (0, 13)


SAES = [(768, 49152, 128), (1024, 32768, 32), (192, 12288, 64), (768, 24576, 1), (768, 16384, 4096)]


@pytest.mark.parametrize(("d", "F", "k"), SAES[:3])
def test_encode_topk_lists_take_a_twentieth_of_dense_codes(d, F, k):
    capacity = encode_topk.list_length(d, F, k, BLOCK_F=128, itemsize=2)
    assert 8 * capacity + 2 * d + 12 <= 0.05 * 4 * F


@pytest.mark.parametrize("BLOCK_F", [64, 256])
@pytest.mark.parametrize(("d", "F", "k"), SAES)
def test_encode_topk_panels_fit_whatever_the_order_of_features(d, F, k, BLOCK_F):
    """Few panels, and none of them adds more than a list has room for."""
    capacity, tiles = encode_topk.list_length(d, F, k, BLOCK_F, itemsize=2), F // BLOCK_F
    panels = encode_topk.panels(F, k, capacity, BLOCK_F)
    assert (panels[0], panels[-1][1]) == ((0, capacity // BLOCK_F), tiles)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(panels))
    assert len(panels) <= 8 or k > F // 8
    order = torch.arange(tiles) * encode_topk.spread(tiles) % tiles
    assert order.unique().numel() == tiles
    noise, rising = torch.randn(F, generator=torch.Generator().manual_seed(0)), torch.arange(F) / F
    nested = 3.0 * (torch.arange(F) < 2048)
    for pre in (noise, noise + 2 * rising, noise - 2 * rising, noise + nested):
        visited = pre.view(tiles, BLOCK_F)[order]
        for first, last in panels[1:]:
            kth = visited[:first].flatten().topk(k).values[-1]
            assert k + (visited[first:last] > kth).sum() <= capacity


# encode_project -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("T", "d", "F"), [(1, 33, 300), (49, 192, 77)])
def test_encode_project(name, T, d, F):
    x, W_enc, b_enc, _ = encoder(T, d, F)
    arguments = (x, draw(T, d, seed=4), W_enc, b_enc, draw(F, d, seed=5), activation(name, F))
    check(encode_project.encode_project, reference.encode_project, *arguments)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["relu", "gated"])
def test_encode_project_of_narrow_numbers(name, dtype):
    x, W_enc, b_enc, _ = encoder(49, 192, 300, dtype)
    arguments = (
        x,
        draw(49, 192, dtype=dtype, seed=4),
        W_enc,
        b_enc,
        draw(300, 192, dtype=dtype),
        activation(name, 300),
    )
    check(encode_project.encode_project, reference.encode_project, *arguments)


@pytest.mark.parametrize("dtype", HALVES)
def test_encode_project_of_tokens_that_were_centred_in_float32(dtype):
    x, W_enc, b_enc, _ = encoder(49, 192, 300, dtype)
    others = (draw(49, 192, dtype=dtype, seed=4), W_enc, b_enc.float(), draw(300, 192, dtype=dtype))
    got = launch(encode_project.encode_project, x.float(), *others, activation("relu", 300))
    expected = launch(encode_project.encode_project, x, *others, activation("relu", 300))
    assert got.dtype == torch.float32
    assert torch.equal(got.to(dtype), expected)


def test_encode_project_keeps_the_relative_precision_of_tanh():
    """The code of one feature, whose pre-activation is x itself."""
    x = torch.logspace(-8, 1.3, 200, dtype=torch.float64, device=DEVICE).float()[:, None]
    one, none = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    for sign in (1, -1):  # a negative code is 0, so the sign is the decoder's
        relu = reference.Activation("tanh_relu")
        got = launch(encode_project.encode_project, x, torch.ones_like(x), one, none, sign * one, relu)
        torch.testing.assert_close(got.double(), sign * x[:, 0].double().tanh(), rtol=1e-6, atol=0)


def test_gate_keeps_the_relative_precision_of_tanh():
    """Of log(w) / log(c_max), for z around 1 and every kappa; log(w) is as large as float32 has room for."""
    kappa = torch.logspace(-6, 1.3, 100, dtype=torch.float64, device=DEVICE).float()[:, None]
    scores = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE)
    for c_max in (1e30, 1e-30):
        got = launch(gate.gate, scores, kappa, torch.full_like(kappa, c_max)).double().log()
        exact = reference.gate(scores.double(), kappa.double(), torch.full_like(kappa, c_max).double()).log()
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=1.2e-7)


def test_encode_project_of_strided_inputs():
    x, W_enc, b_enc, _ = encoder(5, 33, 300)
    g, W_dec = draw(33, 5, seed=4).T, draw(33, 300, seed=5).T
    arguments = (x.T.contiguous().T, g, W_enc.T.contiguous().T, b_enc, W_dec, activation("jumprelu", 300))
    check(encode_project.encode_project, reference.encode_project, *arguments)


def test_encode_project_is_nan_where_its_input_is():
    x, W_enc, b_enc, _ = encoder(5, 33, 100)
    x[3, 4] = float("nan")
    arguments = (x, draw(5, 33, seed=4), W_enc, b_enc, draw(100, 33, seed=5), activation("relu", 100))
    assert check(encode_project.encode_project, reference.encode_project, *arguments)[3].isnan()


def test_encode_project_of_no_tokens_and_of_topk():
    x, W_enc, b_enc, _ = encoder(0, 33, 100)
    assert launch(encode_project.encode_project, x, x, W_enc, b_enc, W_enc.T, activation("relu", 100)).shape == (0,)
    with pytest.raises(ValueError, match="activation: expected one of .* got 'topk'"):
        launch(encode_project.encode_project, x, x, W_enc, b_enc, W_enc.T, reference.Activation("topk", 3))


# all ------------------------------------------------------------------------------------------------------------


def test_results_are_equal_run_to_run():
    arguments = block(3, 50, 32)
    assert torch.equal(launch(relevancy.relevancy, *arguments), launch(relevancy.relevancy, *arguments))
    tokens = encoder(3, 33, 700)
    for once, again in zip(encode_topk.encode_topk(*tokens, 13), encode_topk.encode_topk(*tokens, 13), strict=True):
        assert torch.equal(once, again)
