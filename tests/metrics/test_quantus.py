"""Quantus 0.6 as an outside judge: equal scores where the definition is the same, and how it differs elsewhere.

Quantus sees an image of one pixel per patch, and fastfg the same image enlarged: both run the same forwards.
"""

import numpy as np
import pytest
import torch
from torch import nn

import fastfg
from fastfg.metrics import METRICS
from fastfg.perturb import Readings

quantus = pytest.importorskip("quantus")
OPTIONS = {"normalise": False, "abs": False, "perturb_baseline": 0.0, "disable_warnings": True}


class Small(nn.Module):
    """Logits of an image [B, 1, 4, 4] of one pixel per patch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, pixels):
        return self.layers(pixels)


@pytest.fixture
def given():
    torch.manual_seed(0)
    return Small().eval(), torch.randn(2, 1, 4, 4), torch.rand(2, 4, 4)


def evaluate(given, metrics, **options):
    model, pixels, maps = given
    large = pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)
    options = {"target": 1, "metrics": metrics, "baseline": 0.0} | options
    return fastfg.evaluate(lambda images: model(images[..., ::2, ::2]), large, maps, **options)


def theirs(metric, given, maps=None, softmax=True):
    model, pixels, own = given
    maps = own if maps is None else maps
    x, a = pixels.numpy(), maps.unsqueeze(1).numpy()
    return torch.tensor(np.array(metric(model=model, x_batch=x, y_batch=np.ones(2, int), a_batch=a, softmax=softmax)))


def test_curves_of_pixel_flipping(given):
    found = evaluate(given, ["deletion", "insertion", "pixel_flipping"])
    metric = quantus.PixelFlipping(features_in_step=1, **OPTIONS)
    mif, lif = theirs(metric, given).double(), theirs(metric, given, 1 - given[2]).double()
    torch.testing.assert_close(found.details["deletion"]["curve"][:, 1:], mif, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.details["insertion"]["curve"][:, 1:], lif, rtol=0, atol=1e-6)
    first = found.details["pixel_flipping"]["curve"][:, :1]
    area = torch.trapezoid(torch.cat([first, mif], 1))  # theirs starts after the first step
    torch.testing.assert_close(found["pixel_flipping"], area, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["deletion"], area / 16, rtol=0, atol=1e-6)


def test_aopc_is_the_mean_of_region_perturbation(given):
    found = evaluate(given, ["aopc", "srg"])
    drops = [
        theirs(quantus.RegionPerturbation(patch_size=1, regions_evaluation=16, order=order, **OPTIONS), given).double()
        for order in ("morf", "lerf")
    ]
    torch.testing.assert_close(found["aopc"], drops[0].sum(1) / 17, rtol=0, atol=1e-6)  # the drop of step 0 is 0
    between = torch.trapezoid(torch.nn.functional.pad(drops[0] - drops[1], (1, 0))) / 16
    torch.testing.assert_close(found["srg"], between, rtol=0, atol=1e-6)


def test_infidelity_of_the_same_patches(given):
    """Quantus removes more and more patches in the order of the grid, and weights each pixel by its change."""
    _, pixels, maps = given
    metric = quantus.Infidelity(perturb_patch_sizes=[1], n_perturb_samples=1, **OPTIONS)
    expected = theirs(metric, given, maps / pixels[:, 0], softmax=False).double()  # maps after multiplication
    ours = torch.zeros(2, 16).double()
    for n in range(1, 17):
        first = torch.arange(n).expand(1, 2, 2, n)  # n_runs is at least 2
        found = evaluate(given, ["infidelity"], infidelity={"subsets": first})
        ours[:, n - 1] = found["infidelity"]
    torch.testing.assert_close(ours.mean(1), expected, rtol=1e-5, atol=1e-6)


def test_faithfulness_correlation_and_sensitivity_n_of_the_same_subsets(given, monkeypatch):
    drawn, choice = [], np.random.choice

    def remember(*arguments, **options):
        drawn.append(choice(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(np.random, "choice", remember)
    np.random.seed(0)
    metric = quantus.FaithfulnessCorrelation(nr_runs=20, subset_size=3, return_aggregate=False, **OPTIONS)
    expected = theirs(metric, given, softmax=False).double()
    subsets = torch.tensor(np.array(drawn)).reshape(1, 20, 2, 3)
    options = {"subsets": subsets, "correlation": "pearson"}
    found = evaluate(given, ["faithfulness_correlation"], faithfulness_correlation=options)
    torch.testing.assert_close(found["faithfulness_correlation"], expected, rtol=0, atol=1e-5)


def test_sensitivity_n_is_the_pearson_form_of_faithfulness_correlation(given):
    correlation = {"n_trials": 1, "n_runs": 30, "correlation": "pearson"}
    found = evaluate(
        given,
        ["faithfulness_correlation", "sensitivity_n"],
        faithfulness_correlation=correlation,
        sensitivity_n={"n_trials": 1, "n_runs": 30},
    )
    torch.testing.assert_close(found["sensitivity_n"], found["faithfulness_correlation"])


def test_monotonicity_of_quantus_says_yes_to_every_map(given):
    """Its image stays at the baseline, so no step can lower the reading."""
    metric = quantus.Monotonicity(features_in_step=1, **OPTIONS)
    assert theirs(metric, given).all()
    assert theirs(metric, given, 1 - given[2]).all()
    found = evaluate(given, ["monotonicity"])
    assert found["monotonicity"].min() > 0
    assert not found.details["monotonicity"]["monotonic"].any()


def test_monotonicity_of_the_same_readings():
    curve = torch.tensor([[0.9, 0.5, 0.6, 0.2]]).double()  # read backwards: 0.2, 0.6, 0.5, 0.9
    metric = METRICS["monotonicity"]()
    plan = metric.plan(torch.tensor([[3.0, 2, 1]]).double(), None, None)
    score, details = metric.score(None, plan, Readings(curve, curve, curve))
    assert float(score) == pytest.approx(2 / 3)
    assert bool(details["monotonic"]) == bool(np.all(np.diff(curve.flip(1).numpy()) >= 0))
