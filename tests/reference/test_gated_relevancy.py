"""``gated_relevancy`` equals its three steps one after another."""

import torch

from fastfg import reference
from tests.ops.cases import gated_relevancy


def test_it_is_the_three_steps():
    arguments = gated_relevancy(C=3, B=2, H=2, N=11, dh=4, P=9, d=5, F=20, K=3, identity="paper")
    rows, q, k, v, dO, scale, g, W_dec, values, indices, kappa, c_max, identity = arguments
    found, scores, gates = reference.gated_relevancy(*arguments)
    assert gates.shape == (3, 2, 9)
    for b in range(2):
        expected, _ = reference.project(g[b], W_dec, values[b], indices[b])
        torch.testing.assert_close(scores[b], expected)
    all_gates = torch.ones(3, 2, 11, dtype=torch.float64)  # the first two tokens are a prefix
    for c in range(3):
        all_gates[c, :, 2:] = reference.gate(scores, float(kappa[c]), float(c_max[c]))
        torch.testing.assert_close(gates[c], all_gates[c, :, 2:])
    torch.testing.assert_close(found, reference.relevancy(rows, q, k, v, dO, scale, all_gates, identity))


def test_a_c_max_of_1_gates_nothing():
    arguments = gated_relevancy(C=2, B=2, H=2, N=11, dh=4, P=9, d=5, F=20, K=3)
    rows, _, gates = reference.gated_relevancy(*arguments)
    assert gates[0].eq(1).all()
    assert gates[1].ne(1).any()
    torch.testing.assert_close(rows[0], reference.relevancy(*arguments[:6])[0])
    arguments[6][1, 0] = torch.nan  # a gradient of the second image
    rows, _, gates = reference.gated_relevancy(*arguments)
    assert gates[0].eq(1).all()
    assert gates[1, 1].isnan().all()
    assert rows[0].isfinite().all()


def test_scores_and_gates_have_the_precision_of_the_rows():
    rows, *others = gated_relevancy(C=1, B=2, H=2, N=11, dh=4, P=9, d=5, F=20, K=3)
    others = [t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in others]
    assert {t.dtype for t in reference.gated_relevancy(rows.float(), *others)} == {torch.float32}
