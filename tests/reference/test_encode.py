"""Codes against their definitions, written out again with NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfg import reference
from fastfg.reference.encode_topk import topk_lowest_index
from tests.tools import ACTIVATIONS, random_sae


def by_hand(sae, x):
    """Codes of one token [d]."""
    x = x.numpy()
    if sae.normalization == "layer_norm":
        x = (x - x.mean()) / (x.std(ddof=1) + 1e-5)
    elif sae.normalization == "constant_norm":
        x = x * np.sqrt(len(x)) / np.linalg.norm(x)
    if sae.subtract_b_dec:
        x = x - sae.b_dec.numpy()
    product = x @ sae.W_enc.numpy()
    pre = product + sae.b_enc.numpy()
    kind = sae.activation
    if kind.name == "topk":
        kept = np.argsort(-pre, kind="stable")[: kind.k]
        f = np.zeros_like(pre)
        f[kept] = np.maximum(pre[kept], 0)
        return f
    if kind.name == "relu":
        return np.maximum(pre, 0)
    if kind.name == "tanh_relu":
        return np.tanh(np.maximum(pre, 0))
    if kind.name in ("batch_topk", "jumprelu"):
        return np.maximum(np.where(pre > kind.threshold.numpy(), pre, 0), 0)
    on = product + kind.b_gate.numpy() > 0
    return on * np.maximum(product * np.exp(kind.r_mag.numpy()) + kind.b_mag.numpy(), 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_codes_are_the_definition(activation, normalize, subtract_b_dec):
    sae = random_sae(33, 100, activation, normalize=normalize, subtract_b_dec=subtract_b_dec, **ACTIVATIONS[activation])
    x = torch.randn(7, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2 + 1
    expected = torch.tensor(np.stack([by_hand(sae, token) for token in x]))
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-12, atol=1e-13)
    assert (sae.encode(x) >= 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_topk_takes_the_lowest_index_among_equals(seed, F, levels):
    random = np.random.default_rng(seed)
    x = random.integers(0, levels, size=(6, F)).astype(float)
    k = int(random.integers(1, F + 1))
    values, indices = topk_lowest_index(torch.tensor(x), k)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(x, expected, axis=1))


def test_topk_of_all_equal_and_of_negative():
    values, indices = topk_lowest_index(torch.zeros(2, 10), 3)
    assert indices.tolist() == [[0, 1, 2], [0, 1, 2]]
    values, indices = reference.encode_topk(-torch.ones(1, 1), torch.ones(1, 4), torch.zeros(4), None, 2)
    assert values.tolist() == [[0.0, 0.0]]
    assert indices.tolist() == [[0, 1]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_never_turned_into_0(activation):
    sae = random_sae(33, 100, activation, **ACTIVATIONS[activation])
    x = torch.randn(2, 33, dtype=torch.float64)
    x[1, 5] = torch.nan
    assert sae.encode(x)[0].isfinite().all()
    assert sae.encode(x)[1].isnan().any()


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="normalize: expected one of .* got 'batch'"):
        reference.normalize(torch.zeros(1, 3), "batch")
    with pytest.raises(ValueError, match="activation: expected one of .* got 'elu'"):
        reference.encode(torch.zeros(1, 3), torch.zeros(3, 4), torch.zeros(4), None, reference.Activation("elu"))
