"""SaCo by hand, in another order of loops, and on toys with a known answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastfg
from fastfg.metrics import saco_score
from fastfg.metrics.saco import group_of_rank


def by_the_definition(a, d):
    """The loop over pairs, sorted by attribution."""
    order = np.argsort(-np.asarray(a), kind="stable")
    a, d = np.asarray(a)[order], np.asarray(d)[order]
    total = signed = 0.0
    for i in range(len(a)):
        for j in range(i + 1, len(a)):
            weight = a[i] - a[j]
            signed += -weight if (d[i] - d[j]) * (a[i] - a[j]) < 0 else weight
            total += weight
    return signed / total if total else 0.0


def test_by_hand():
    # pairs: (3, 2) weighs 1 and agrees; (3, 0) weighs 3 and agrees; (2, 0) weighs 2 and does not: (1 + 3 - 2) / 6
    assert float(saco_score(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([0.5, 0.1, 0.2]))) == pytest.approx(1 / 3)
    assert float(saco_score([2.0, 1.0], [1.0, 0.0])) == 1.0
    assert float(saco_score([2.0, 1.0], [0.0, 1.0])) == -1.0
    assert float(saco_score([2.0, 1.0], [0.5, 0.5])) == 1.0  # equal impacts do not disagree
    assert float(saco_score([1.0, 1.0], [0.0, 1.0])) == 0.0  # no weight at all


@given(st.integers(0, 2**32 - 1), st.integers(2, 15))
@settings(max_examples=60, deadline=None)
def test_against_the_loop(seed, n):
    random = np.random.default_rng(seed)
    a, d = random.integers(-4, 5, (2, 3, n)) / 4
    expected = [by_the_definition(a[i], d[i]) for i in range(3)]
    np.testing.assert_allclose(saco_score(a, d).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_nan_stays_nan_and_shapes_are_checked():
    assert saco_score([torch.nan, 1.0], [0.0, 1.0]).isnan()
    assert saco_score([2.0, 1.0], [torch.nan, 1.0]).isnan()
    with pytest.raises(ValueError, match=r"impact: expected \[2\]"):
        saco_score(torch.zeros(2), torch.zeros(3))


def test_ties_count_as_agreement_and_their_share_is_in_the_details():
    def model(images):  # patch 0 alone matters
        z = images[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([z, torch.zeros_like(z)], 1)

    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = torch.tensor([[[[3.0, 2.0], [1.0, 0.0]]], [[[0.0, 1.0], [2.0, 3.0]]]])
    scores = fastfg.evaluate(model, images, maps, target=0, baseline="zero", metrics=["saco"], saco={"n_bins": 4})
    # weights 1, 2, 3 with patch 0, and 1, 2, 1 of pairs with the same impact
    assert scores.details["saco"]["tied"].flatten().tolist() == pytest.approx([0.4, 0.4])
    assert scores["saco"].flatten().tolist() == pytest.approx([1.0, -0.2])
    assert scores.errors == []


@pytest.mark.parametrize(("P", "n_bins"), [(196, 49), (49, 13), (24, 6), (10, 10), (7, 3)])
def test_groups_are_numpys_array_split(P, n_bins):
    sizes = [len(part) for part in np.array_split(np.arange(P), n_bins)]
    assert group_of_rank(P, n_bins).bincount().tolist() == sizes


@pytest.mark.parametrize(("side", "n_bins"), [(14, 49), (7, 13), (3, 3)])
def test_the_default_number_of_groups_is_a_quarter_of_the_patches_rounded_up(side, n_bins):
    images, maps = torch.rand(1, 3, 2 * side, 2 * side), torch.rand(1, side, side)
    scores = fastfg.evaluate(
        lambda x: torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1), images, maps, target=0, metrics=["saco"]
    )
    assert scores.details["saco"]["impact"].shape[-1] == n_bins
