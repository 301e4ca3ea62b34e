"""``gated_relevancy`` against the float64 reference, as ``parity.py`` does for the other ops."""

from __future__ import annotations

import pytest
import torch

from fastfg import reference
from tests.kernels.tools import (
    HALVES,
    block,
    check,
    codes,
    draw,
    launch,
    poisoned,  # noqa: F401
)

# isort: split
from fastfg.kernels import gate, gated_relevancy, project, relevancy


def gated_block(C, N, prefix, dtype=torch.float32, B=2, d=33, F=77, K=13):
    """All arguments but ``identity``; rows are float32, as they are whatever the model. Row 0 is not gated."""
    P = N - prefix
    rows, q, k, v, dO, scale, _ = block(C, N, 32, B=B, dtype=dtype)
    values, indices = (t.unflatten(0, (B, P)) for t in codes(B * P, F, K, dtype))
    g = draw(B, N, d, dtype=dtype, seed=6)[:, prefix:]
    kappa, c_max = draw(C, seed=7).exp(), 1 + draw(C, seed=8).exp()
    c_max[0] = 1
    return [rows.float(), q, k, v, dO, scale, g, draw(F, d, dtype=dtype, seed=9), values, indices, kappa, c_max]


def check_gated(*arguments, allowed=0.0):
    return check(gated_relevancy.gated_relevancy, reference.gated_relevancy, *arguments, allowed=allowed)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("C", [1, 3, 17])
def test_gated_relevancy(C, prefix):
    _, _, gates = check_gated(*gated_block(C, 50, prefix), "paper" if prefix == 1 else "transmm")
    assert torch.equal(gates[0], torch.ones_like(gates[0]))


@pytest.mark.parametrize("dtype", HALVES)
def test_gated_relevancy_of_narrow_numbers(dtype):
    """Only the product with several rows is narrower than float32: three bfloat16 ones."""
    check_gated(*gated_block(3, 50, 1, dtype), allowed=2**-14)


@pytest.mark.parametrize("whole", [False, True])
def test_gated_relevancy_equals_its_parts(whole, monkeypatch):
    monkeypatch.setattr(relevancy, "PROGRAMS", 1 if whole else 264)
    rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max = gated_block(3, 50, 1)
    scores, _ = project.project(g.flatten(0, 1), W_dec, values.flatten(0, 1), indices.flatten(0, 1))
    gates = launch(gate.gate, scores.unflatten(0, g.shape[:2]), kappa[:, None, None], c_max[:, None, None])
    every = torch.cat([torch.ones_like(gates[..., :1]), gates], -1)
    got = launch(gated_relevancy.gated_relevancy, rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max)
    new = launch(relevancy.relevancy, rows, q, k, v, dO, scale, every)
    for ours, parts in zip(got, (new, scores, gates), strict=True):
        torch.testing.assert_close(ours.flatten(), parts.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("odd", [0, 1])
def test_gated_relevancy_of_equal_scores(odd):
    """A MAD of 0: the equal ones have gate 1, the odd one the largest or the least."""
    arguments = gated_block(3, 20, 1)
    g, values, indices, c_max = arguments[6], arguments[8], arguments[9], arguments[11]
    arguments[6], arguments[8], arguments[9] = (t[:, :1].expand_as(t).clone() for t in (g, values, indices))
    arguments[8][:, :odd] *= 2
    _, _, gates = check_gated(*arguments)
    assert torch.equal(gates[..., odd:], torch.ones_like(gates[..., odd:]))
    for c in range(3):
        edges = torch.stack([c_max[c], 1 / c_max[c]])
        assert all((gates[c, :, :odd, None] - edges).abs().amin(-1).flatten() < 1e-5)


def test_gated_relevancy_is_nan_where_its_input_is():
    arguments = gated_block(3, 20, 1)
    arguments[11][0] = 2.0
    arguments[8][1, 3, 2] = float("nan")
    rows, scores, gates = check_gated(*arguments)
    assert scores.isnan().nonzero().tolist() == [[1, 3]]
    assert gates[:, 1].isnan().all()
    assert rows[:, 0].isfinite().all()


def test_gated_relevancy_leaves_rows_that_are_not_gated_alone():
    arguments = gated_block(3, 20, 1)
    arguments[8][1, 3, 2] = float("nan")
    rows, _, gates = launch(gated_relevancy.gated_relevancy, *arguments)
    assert torch.equal(gates[0], torch.ones_like(gates[0]))
    expected = launch(relevancy.relevancy, *arguments[:6])[0]
    torch.testing.assert_close(rows[0], expected, rtol=1e-5, atol=1e-5)


def test_gated_relevancy_takes_the_log_sum_exp_that_a_model_kept():
    arguments = gated_block(1, 20, 1)
    _, q, k, _, _, scale = arguments[:6]
    lse = torch.logsumexp(q @ k.mT * scale, -1)
    got = launch(gated_relevancy.gated_relevancy, *arguments, lse=lse)
    for ours, expected in zip(got, launch(gated_relevancy.gated_relevancy, *arguments), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_gated_relevancy_is_equal_run_to_run():
    arguments = gated_block(3, 50, 1)
    once, again = (launch(gated_relevancy.gated_relevancy, *arguments) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize(("C", "B"), [(0, 2), (2, 0)])
def test_gated_relevancy_of_nothing(C, B):
    arguments = gated_block(2, 6, 1, B=B)
    arguments[0], arguments[10], arguments[11] = arguments[0][:C], arguments[10][:C], arguments[11][:C]
    rows, scores, gates = launch(gated_relevancy.gated_relevancy, *arguments)
    assert (rows.shape, scores.shape, gates.shape) == ((C, B, 6), (B, 5), (C, B, 5))
    assert scores.isfinite().all()


@pytest.mark.parametrize("index", [-1, 77])
def test_gated_relevancy_is_nan_for_a_feature_that_the_decoder_lacks(index):
    """Its row is not read; it would be outside of memory."""
    arguments = gated_block(3, 20, 1)
    arguments[9][1, 3, 2] = index
    rows, scores, gates = launch(gated_relevancy.gated_relevancy, *arguments)
    assert scores.isnan().nonzero().tolist() == [[1, 3]]
    assert gates[1:, 1].isnan().all()
    assert torch.equal(gates[0], torch.ones_like(gates[0]))  # not gated
    assert rows[0].isfinite().all()
    assert rows[:, 0].isfinite().all()
