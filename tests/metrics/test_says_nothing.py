"""A score without meaning is NaN, and its error says why."""

import pytest
import torch

import fastfg
from fastfg.metrics import DEFAULT_METRICS
from tests.tools import tiny_vit

IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MAPS = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(4))


def reasons(scores):
    """The reasons by metric and image. Each missing score has a reason, and no other score has one."""
    for metric, values in scores.items():
        missing = {(e.config, e.image) for e in scores.errors if e.metric == metric}
        nan = values.isnan().nonzero().tolist()
        assert missing == {(None, place[0]) if len(place) == 1 else tuple(place) for place in nan}
    return {(e.metric, e.image): e.message for e in scores.errors}


def patch_means(images):
    return images.unflatten(-1, (6, 8)).unflatten(-3, (4, 8)).mean((1, 3, 5)).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_does_not_look_at_the_image(dtype):
    def model(images):
        return torch.tensor([[1.0, 2.0]], dtype=images.dtype).expand(len(images), 2)

    found = reasons(fastfg.evaluate(model, IMAGES.to(dtype), MAPS, target=1))
    assert len(found) == 9
    assert set(found.values()) == {"removing patches does not change the reading"}


def test_rounding_alone_is_no_change():
    def model(images):
        noise = 1e-7 * images.mean((1, 2, 3)).sin()
        return torch.stack([1 + noise, torch.full_like(noise, 2.0)], 1)

    assert len(reasons(fastfg.evaluate(model, IMAGES.float(), MAPS, target=0))) == 9


def test_small_changes_of_a_probability_are_changes():
    def model(images):  # a very confident model
        z = 30 + patch_means(images) @ torch.linspace(1, 2, 24, dtype=images.dtype)
        return torch.stack([z, torch.zeros_like(z)], 1)

    scores = fastfg.evaluate(model, IMAGES, MAPS, target=0)
    assert reasons(scores) == {}
    assert 0 < scores.details["saco"]["impact"].abs().max() < 1e-11


def test_a_constant_map(model, images):
    maps = torch.rand(2, 3, 4, 6)
    maps[1, 2] = 0.25
    scores = fastfg.evaluate(model, images, maps, target=1)
    found = reasons(scores)
    assert found == {(metric, 2): "the attribution is the same for every patch" for metric in DEFAULT_METRICS}
    assert all(values[0].isfinite().all() for values in scores.values())
    assert scores.details["pixel_flipping"]["curve"].shape == (2, 3, 25)
    assert scores.details["pixel_flipping"]["curve"][1, 2].isnan().all()
    assert scores.details["faithfulness_correlation"]["subsets"][1, 2].eq(-1).all()


@pytest.mark.parametrize("baseline", ["mean", "zero", "noise"])
def test_a_blank_image(model, images, baseline):
    images = images.clone()
    images[1] = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    found = reasons(fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=1, baseline=baseline))
    assert found == {(metric, 1): "the image is blank: all its pixels are the same" for metric in DEFAULT_METRICS}


def test_infinite_readings():
    def model(images):
        means = patch_means(images)
        z = torch.where(means[:, 3].abs() < 1e-9, torch.inf, means.sum(1))
        return torch.stack([z, torch.zeros_like(z)], 1)

    scores = fastfg.evaluate(model, IMAGES, MAPS, target=0, baseline="zero")
    assert set(reasons(scores).values()) == {"the model's logits are not finite"}
    assert scores["faithfulness_correlation"].isnan().all()


def test_the_same_impact_for_every_group():
    def model(images):  # sees only whether anything is missing
        whole = (patch_means(images).abs() > 1e-12).all(1).to(images.dtype)
        return torch.stack([whole, torch.zeros_like(whole)], 1)

    found = reasons(fastfg.evaluate(model, IMAGES, MAPS, target=0, baseline="zero"))
    for image in range(3):
        assert found["saco", image] == "all groups of patches have the same impact"
        assert (
            found["faithfulness_correlation", image]
            == "the drop of the subsets has a standard deviation below 1e-10, in each trial"
        )
        assert ("pixel_flipping", image) not in found


def test_subsets_of_the_same_attribution(model, images):
    maps = torch.tensor([1.0, -1.0]).repeat(12).reshape(1, 4, 6).expand(3, -1, -1)
    subsets = torch.arange(24).reshape(1, 12, 1, 2).expand(-1, -1, 3, -1)  # each sums to 0
    options = {"metrics": ["faithfulness_correlation"], "faithfulness_correlation": {"subsets": subsets}}
    found = reasons(fastfg.evaluate(model, images, maps, target=1, **options))
    assert set(found.values()) == {"the attribution of the subsets has a standard deviation below 1e-10, in each trial"}


def test_small_probabilities_under_a_fixed_logit():
    def model(images):  # class 0 has the logit 0 always, and a probability from 1e-12 to 1e-8
        z = 22 + patch_means(images) @ torch.linspace(1, 2, 24, dtype=images.dtype)
        return torch.stack([torch.zeros_like(z), z], 1)

    scores = fastfg.evaluate(model, IMAGES.float(), MAPS, target=0)
    assert {metric for metric, _ in reasons(scores)} == {"faithfulness_correlation"}  # it reads the logit
    assert scores["pixel_flipping"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_outputs_own_rounding_decides(dtype):
    """Images in half precision do not make real effects of a wider model rounding."""

    def model(images):
        z = 10 + 1e-3 * patch_means(images.to(dtype)) @ torch.linspace(1, 2, 24, dtype=dtype)
        return torch.stack([z, torch.zeros_like(z)], 1)

    assert reasons(fastfg.evaluate(model, IMAGES.bfloat16(), MAPS, target=0)) == {}


def test_effects_of_a_model_in_half_precision_are_scored():
    def model(images):
        z = 12 + 0.1 * patch_means(images) @ torch.linspace(1, 2, 24, dtype=images.dtype)
        return torch.stack([z, torch.zeros_like(z)], 1)

    scores = fastfg.evaluate(model, IMAGES.bfloat16(), MAPS, target=0, metrics=["faithfulness_correlation"])
    assert reasons(scores) == {}


def test_a_map_that_differs_by_rounding_alone(model, images):
    maps = torch.full((3, 4, 6), 0.3)
    maps[:, 1, 2] = torch.nextafter(maps[0, 0, 0], torch.tensor(1.0))
    found = reasons(fastfg.evaluate(model, images, maps, target=1, metrics=["saco"]))
    assert set(found.values()) == {"the attribution is the same for every patch"}


def test_a_float64_map_may_differ_little_from_one_value():
    """As under mean pooling, where each patch starts at 1 / N."""
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = 0.0625 + 1e-9 * torch.rand(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def model(images):
        return torch.stack([images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))], dim=1)

    found = fastfg.evaluate(model, images, maps, target=0, metrics=["saco"])
    assert found.errors == []
    same = fastfg.evaluate(model, images, (maps - maps.mean()) * 1e9, target=0, metrics=["saco"])
    assert float(found["saco"]) == pytest.approx(float(same["saco"]), abs=1e-6)
    rounded = fastfg.evaluate(model, images, maps.float(), target=0, metrics=["saco"])
    assert "the same for every patch" in rounded.errors[0].message
    alike = torch.full((1, 4, 4), 0.1, dtype=torch.float64)
    alike[0, 0] *= 1 + 1e-15
    assert (
        "the same for every patch"
        in fastfg.evaluate(model, images, alike, target=0, metrics=["saco"]).errors[0].message
    )


def quantised(dtype, n_maps=8):
    """Random maps for a sure model with one logit, whose output is in ``dtype``."""
    weights = torch.rand(24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def model(images):
        return (4 + 0.05 * patch_means(images) @ weights.to(images.dtype))[:, None].to(dtype)

    maps = torch.rand(n_maps, 3, 4, 6, generator=torch.Generator().manual_seed(6))
    return fastfg.evaluate(model, IMAGES, maps, target=1, metrics=["saco", "monotonicity"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_that_half_precision_makes_are_no_agreement(dtype):
    scores = quantised(dtype)
    tied = scores.details["saco"]["tied"]
    assert torch.equal(scores["saco"].isnan(), tied > 0.1)
    found = {(e.metric, e.config, e.image): e.message for e in scores.errors}
    assert found
    for (metric, config, image), message in found.items():
        if message == "removing patches does not change the reading":
            continue
        assert "half precision" in message
        assert "run the model in float32" in message
        assert f"{float(scores.details[metric]['tied'][config, image]):.0%} of the" in message
    assert {metric for metric, _, _ in found} == {"saco", "monotonicity"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_are_rare_in_other_precisions(dtype):
    scores = quantised(dtype)
    assert scores.errors == []
    assert scores.details["saco"]["tied"].max() < 0.01
    assert scores["saco"].mean().abs() < 0.3


def test_few_ties_in_half_precision_are_scored():
    def model(images):
        z = 30 * patch_means(images) @ torch.linspace(-1, 1, 24, dtype=images.dtype)
        return torch.stack([z, torch.zeros_like(z)], 1)

    def scores(dtype):
        target = fastfg.Target(0, link=None)
        return fastfg.evaluate(model, IMAGES.to(dtype), MAPS, target=target, metrics=["saco"], baseline="zero")

    half, full = scores(torch.float16), scores(torch.float64)
    assert half.errors == []
    torch.testing.assert_close(half["saco"], full["saco"], atol=0.1, rtol=0)


def test_a_model_in_half_precision_whose_output_is_converted():
    """Its logits have no more digits than before."""
    torch.manual_seed(0)
    model = tiny_vit(dtype=torch.bfloat16, num_classes=1)
    model.head.weight.data.mul_(0.03)
    model.head.bias.data.fill_(4.0)
    model.register_forward_hook(lambda module, args, output: output.float())
    scores = fastfg.evaluate(model, IMAGES.bfloat16(), MAPS, target=1, metrics=["saco"])
    assert len(scores.errors) == 3
    assert all("half precision" in error.message for error in scores.errors)
