"""Equations 2 and 3: the sparse and the streaming form equal the dense one."""

import sys

import pytest
import torch

from fastfg import reference
from fastfg.reference.project import contributions
from tests.tools import ACTIVATIONS, random_sae


@pytest.mark.parametrize("k", [1, 13, 100])
def test_sparse_form_equals_dense_form(k):
    sae = random_sae(33, 100, "topk", k=k)
    x, g = torch.randn(2, 49, 33, dtype=torch.float64)
    values, indices = sae.encode_sparse(x)
    dense = reference.project_dense(g, sae.W_dec, sae.encode(x))
    scores, terms = reference.project(g, sae.W_dec, values, indices)
    torch.testing.assert_close(scores, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.sum(-1), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms[3, 0], values[3, 0] * (sae.W_dec[indices[3, 0]] @ g[3]))


def test_chunks_of_tokens_cover_all_tokens(monkeypatch):
    g, W_dec, values = torch.randn(7, 5), torch.randn(9, 5), torch.rand(7, 3)
    indices = torch.randint(0, 9, (7, 3))
    monkeypatch.setattr(sys.modules["fastfg.reference.project"], "TILE", 2 * 3 * 5)
    _, terms = reference.project(g, W_dec, values, indices)
    torch.testing.assert_close(terms, contributions(g, W_dec, values, indices))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "topk"])
def test_streaming_form_equals_dense_form(activation, monkeypatch):
    monkeypatch.setattr(sys.modules["fastfg.reference.encode_project"], "FEATURES_AT_ONCE", 17)
    sae = random_sae(33, 100, activation, subtract_b_dec=False, **ACTIVATIONS[activation])
    x, g = torch.randn(2, 49, 33, dtype=torch.float64)
    scores = reference.encode_project(x, g, sae.W_enc, sae.b_enc, sae.W_dec, sae.activation)
    torch.testing.assert_close(scores, reference.project_dense(g, sae.W_dec, sae.encode(x)), rtol=1e-11, atol=1e-11)


def test_streaming_form_refuses_topk():
    sae = random_sae(4, 10, "topk", k=2)
    with pytest.raises(ValueError, match="got 'topk'"):
        reference.encode_project(torch.zeros(1, 4), torch.zeros(1, 4), sae.W_enc, sae.b_enc, sae.W_dec, sae.activation)
