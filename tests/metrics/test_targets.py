"""Targets of ``evaluate``: a single logit read as a sigmoid, a class by softmax, or a function of the output."""

import pytest
import torch

import fastfg
from tests.tools import tiny_vit

MAPS = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(4))


class Pair(torch.nn.Module):
    """The logits (0, z) in place of z: their softmax is (1 - sigmoid(z), sigmoid(z))."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        z = self.model(images)
        return torch.cat([torch.zeros_like(z), z], 1)


@pytest.fixture
def one_logit():
    return tiny_vit(num_classes=1)


def test_one_logit_is_a_sigmoid(one_logit, images):
    pair = Pair(one_logit)
    for target in (1, 0, [1, 0, 1]):
        found = fastfg.evaluate(one_logit, images, MAPS, target=target, path="pixels")
        expected = fastfg.evaluate(pair, images, MAPS, target=target)
        for metric in ("saco", "pixel_flipping"):
            torch.testing.assert_close(found[metric], expected[metric], rtol=1e-9, atol=1e-12)
        assert found.errors == []
    for metric in found:
        assert len(found[metric].unique()) == 3
        assert not found[metric].eq(1.0).any()
    drop = fastfg.evaluate(one_logit, images, MAPS, target=1).details["faithfulness_correlation"]["drop"]
    other = fastfg.evaluate(one_logit, images, MAPS, target=0).details["faithfulness_correlation"]["drop"]
    torch.testing.assert_close(drop, -other, rtol=1e-9, atol=1e-12)


def test_one_logit_predicts_a_side_and_has_two_classes(one_logit, images, caplog):
    z = one_logit(images)[:, 0]
    chosen = fastfg.evaluate(one_logit, images, MAPS, target=None, metrics=["saco"])
    expected = fastfg.evaluate(one_logit, images, MAPS, target=(z > 0).long(), metrics=["saco"])
    assert torch.equal(chosen["saco"], expected["saco"])
    with pytest.raises(ValueError, match="target: expected classes from 0 to 1, got \\[2\\]"):
        fastfg.evaluate(one_logit, images, MAPS, target=2)


def test_a_function_of_the_output(model, images):
    found = fastfg.evaluate(model, images, MAPS, target=lambda logits: logits[:, 2])
    expected = fastfg.evaluate(model, images, MAPS, target=2)
    torch.testing.assert_close(found["faithfulness_correlation"], expected["faithfulness_correlation"])
    curve = found.details["pixel_flipping"]["curve"]  # a curve of the value, which is not a probability
    torch.testing.assert_close(curve[:, 0], model(images)[:, 2].detach())
    with pytest.raises(
        ValueError, match="saco: expected impact='target' for a target without probabilities, got 'max'"
    ):
        fastfg.evaluate(model, images, MAPS, target=lambda logits: logits[:, 2], saco={"impact": "max"})
    with pytest.raises(ValueError, match="target: expected a function that returns one value per image, \\[3\\], got"):
        fastfg.evaluate(model, images, MAPS, target=lambda logits: logits)


def test_a_function_that_holds_one_value_per_image_is_refused(model):
    """It would read perturbed images in the place of others, without an error where the numbers of rows agree."""
    images, weights = torch.randn(16, 3, 32, 48, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)
    maps = torch.rand(16, 4, 6)
    with pytest.raises(ValueError, match="target: expected a function that takes any number of rows, got"):
        fastfg.evaluate(model, images, maps, target=lambda logits: (logits * weights).sum(1))
    with pytest.raises(ValueError, match="target: expected a function of each row of the output alone"):
        fastfg.evaluate(model, images, maps, target=lambda logits: logits[:, 0] - logits[:, 0].mean())
    assert fastfg.evaluate(model, images[:2], maps[:2], target=lambda logits: (logits * weights[0]).sum(1)).errors == []
