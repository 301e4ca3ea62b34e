"""Correlations against SciPy, and the drawing of subsets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fastfg
from fastfg.metrics import correlation
from fastfg.metrics.subsets import default_subset_size, draw_subsets


@given(st.integers(0, 2**32 - 1), st.integers(3, 25))
@settings(max_examples=60, deadline=None)
def test_against_scipy(seed, n):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 6, (2, n)).astype(float)  # with ties
    for kind, scipy in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        found = float(correlation(a, b, kind))
        if a.std() < 1e-10 or b.std() < 1e-10:
            assert found == 0.0
        else:
            assert found == pytest.approx(scipy(a, b).statistic, abs=1e-12)


def test_batched_flat_and_nan():
    a = torch.randn(4, 3, 20)
    found = correlation(a, a * 2 + 1)
    assert found.shape == (4, 3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.ones(4, 3).double())
    assert float(correlation(torch.ones(5), torch.randn(5))) == 0.0
    assert float(correlation(torch.randn(5) * 1e-12, torch.randn(5))) == 0.0
    assert correlation([1.0, torch.nan, 2.0], [1.0, 2.0, 3.0]).isnan()
    with pytest.raises(ValueError, match="kind: expected one of .* got 'kendall'"):
        correlation([1.0, 2.0], [1.0, 2.0], "kendall")


def test_subsets_are_drawn_without_replacement_and_evenly():
    subsets = draw_subsets(10, 50, 40, 3, torch.Generator().manual_seed(0))
    assert subsets.shape == (50, 40, 3)
    assert (subsets.sort(-1).values.diff(dim=-1) > 0).all()
    share = subsets.flatten().bincount(minlength=10) / subsets.numel()
    assert stats.chisquare(share.numpy() * subsets.numel()).pvalue > 1e-3


def test_the_default_subset_size():
    """20 patches in a grid of 100 or more; a fifth of a smaller grid, but at least two."""
    sizes = {4: 2, 9: 2, 10: 2, 49: 10, 81: 16, 99: 20, 100: 20, 101: 20, 196: 20, 1369: 20}
    assert {P: default_subset_size(P) for P in sizes} == sizes


def test_ties_do_not_depend_on_the_order_in_which_a_subset_was_drawn(model, images):
    drawn = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 1, 3], [3, 1, 0], [1, 2, 3], [3, 2, 1]])
    maps = torch.tensor([0.1, 0.2, 0.3, 0.7, *[0.0] * 20]).reshape(1, 4, 6).expand(3, -1, -1)

    def score(subsets):
        given = subsets.reshape(1, 7, 1, 3).expand(-1, -1, 3, -1)
        options = {"metrics": ["faithfulness_correlation"], "faithfulness_correlation": {"subsets": given}}
        return fastfg.evaluate(model, images, maps, target=1, **options)["faithfulness_correlation"]

    assert torch.equal(score(drawn), score(drawn.sort(-1).values))


def test_pearson_of_numbers_whose_squares_overflow():
    a, b = torch.randn(2, 30, dtype=torch.float64)
    for scale in (1e160, 1e-3, 1.0):
        assert float(correlation(a * scale, b, "pearson")) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
