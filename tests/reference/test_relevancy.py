"""Equations 1 and 6: by hand, and the row form against the matrix form."""

import pytest
import torch

from fastfg import reference
from fastfg.reference.relevancy import attention_map


def test_clamp_comes_before_the_mean_over_heads():
    attn = torch.full((1, 2, 1, 1), 0.5)
    dattn = torch.tensor([4.0, -2.0]).reshape(1, 2, 1, 1)
    assert attention_map(attn, dattn).item() == 1.0  # mean of 2 and 0, not of 2 and -1


def test_matrix_form_by_hand():
    E1, E2 = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    w = torch.tensor([[1.0, 10.0]])
    ones = [torch.ones(1, 1, 2, 2)] * 2
    R = reference.relevancy_matrix([E1[None, None], E2[None, None]], ones, [w, None])
    eye = torch.eye(2)
    R1 = eye + E1 @ torch.diag(w[0])
    torch.testing.assert_close(R[0], R1 + E2 @ R1)
    paper = reference.relevancy_matrix([E1[None, None]], ones[:1], [w], "paper")
    torch.testing.assert_close(paper[0], eye + (eye + E1) @ torch.diag(w[0]))


@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("N", [5, 50])
def test_row_form_equals_matrix_form(identity, N):
    torch.manual_seed(0)
    L, B, H, dh = 4, 2, 3, 8
    q, k, v, dO = torch.randn(4, L, B, H, N, dh, dtype=torch.float64)
    gates = torch.rand(L, 1, B, N, dtype=torch.float64) + 0.5
    attn, dattn = torch.softmax(q @ k.mT * dh**-0.5, -1), dO @ v.mT
    R = reference.relevancy_matrix(list(attn), list(dattn), [w[0] for w in gates], identity)
    start = torch.randn(1, B, N, dtype=torch.float64)
    rows = start
    for block in reversed(range(L)):
        args = (q[block], k[block], v[block], dO[block], dh**-0.5, gates[block], identity)
        rows = reference.relevancy(rows, *args)
    torch.testing.assert_close(rows[0], torch.einsum("bn,bnm->bm", start[0], R), rtol=1e-12, atol=1e-12)


def test_unknown_identity():
    t = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="identity: expected one of .* got 'both'"):
        reference.relevancy(torch.zeros(1, 1, 2), t, t, t, t, 1.0, None, "both")
