"""Metrics plan and score the maps of many images in one call. Each score is that of the image alone, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import fastfg
from fastfg.metrics import METRICS, SaCo, planning
from fastfg.metrics.explanation_metric import ExplanationMetric
from fastfg.metrics.localisation import Localisation

B, C, G = 5, 3, 6
KEYS = [f"image {i}" for i in range(B)]
NAMES = [name for name, metric in METRICS.items() if not issubclass(metric, (Localisation, ExplanationMetric))]


def model(images):
    weight = torch.linspace(-1, 2, images[0].numel()).reshape(images.shape[1:])
    return torch.stack([(images * weight).tanh().mean((1, 2, 3)), images.square().mean((1, 2, 3))], dim=1)


@pytest.fixture
def inputs():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(B, 3, 24, 24, generator=random)
    maps = torch.randn(C, B, G, G, generator=random)
    maps[1, 0], maps[2, 3, 0, 0] = 1.0, torch.nan  # two of the maps can't be judged, and no map of the last image
    maps[:, 4] = 0.0
    return images, maps


def judged(images, maps, rows=slice(None), **options):
    return fastfg.evaluate(model, images[rows], maps[:, rows], target=0, keys=KEYS[rows], **options)


def assert_same(together, alone, i):
    for name in together.by_metric:
        assert torch.equal(together[name][:, i].nan_to_num(7), alone[name][:, 0].nan_to_num(7)), name
        for detail, values in alone.details[name].items():
            found = together.details[name][detail][:, i]
            assert torch.equal(found.nan_to_num(7), values[:, 0].nan_to_num(7)), (name, detail)
    mine = [(e.metric, e.config, e.message) for e in together.errors if e.image == i]
    assert mine == [(e.metric, e.config, e.message) for e in alone.errors]


@pytest.mark.parametrize(
    ("names", "baseline"), [(NAMES, "mean"), (("saco", "pixel_flipping"), "running_mean"), (("deletion",), "noise")]
)
def test_an_image_has_the_score_that_it_has_alone(inputs, monkeypatch, names, baseline):
    images, maps = inputs
    whole = judged(images, maps, metrics=names, baseline=baseline)
    monkeypatch.setattr(planning, "AT_ONCE", 4 * G**4)  # the maps of one image, or of two that have fewer
    pieces = judged(images, maps, metrics=names, baseline=baseline)
    assert whole.forwards == pieces.forwards
    for i in range(B):
        alone = judged(images, maps, slice(i, i + 1), metrics=names, baseline=baseline)
        assert_same(whole, alone, i)
        assert_same(pieces, alone, i)


def test_the_last_bit_does_not_depend_on_the_number_of_maps():
    """Sums over rows of a large tensor are not split among threads in another way than those of a small one."""
    random = torch.Generator().manual_seed(1)
    n = 64
    images, maps = torch.rand(n, 3, 28, 28, generator=random), torch.randn(1, n, 14, 14, generator=random)
    names = ["saco", "faithfulness_correlation", "insertion", "srg", "infidelity", "sensitivity_n"]
    options = {"metrics": names, "target": 0, "insertion": {"patches_per_step": 7}, "srg": {"patches_per_step": 7}}
    whole = fastfg.evaluate(model, images, maps, keys=range(n), **options)
    for i in (0, 17, 63):
        alone = fastfg.evaluate(model, images[[i]], maps[:, [i]], keys=[i], **options)
        for name in names:
            assert torch.equal(whole[name][:, i], alone[name][:, 0]), name


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled(SaCo):
    """A user's metric that looks at all maps of its image at once."""

    name = "scaled"

    def score(self, maps, plan, readings):
        assert len(maps) <= C, "expected the maps of one image"
        scores, details = super().score(maps, plan, readings)
        return scores * maps.abs().max(), details


def test_a_subclass_gets_the_maps_of_one_image(inputs):
    images, maps = inputs
    found = judged(images, maps, metrics=[Scaled()])
    plain = judged(images, maps, metrics=["saco"])["saco"]
    assert torch.allclose(found["scaled"][:, 1], plain[:, 1] * maps[:, 1].abs().max())


def test_the_metrics_that_state_it_are_called_once_per_group(inputs, monkeypatch):
    images, maps = inputs
    calls = []
    score = SaCo.score
    monkeypatch.setattr(SaCo, "score", lambda *args: calls.append(len(args[1])) or score(*args))
    judged(images, maps, metrics=["saco"])
    assert calls == [C * (B - 1) - 2]
