"""Evaluation on the fake GPU equals evaluation on the CPU, for every path, baseline and precision; see
test_rehearsal.py."""

import pytest
import torch

import fastfg
from fastfg.perturb import FILLS
from tests.attribution.test_attribute import assert_unchanged, state_of
from tests.tools import random_sae, tiny_vit

SIZE = (32, 48)  # 4 x 6 patches
COARSE = {"faithfulness_correlation": {"n_runs": 5, "n_trials": 2}, "pixel_flipping": {"patches_per_step": 6}}


def given(dtype=torch.float64, **options):
    """A model with a known normalisation, images, and two maps per image."""
    model = tiny_vit(dtype=dtype, **options)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    random = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *SIZE, generator=random, dtype=torch.float64).to(dtype)
    return model, images, torch.rand(2, 3, 4, 6, generator=random)


def judged(model, images, maps, **options):
    return fastfg.evaluate(model, images, maps, **{"target": 1, "keys": ["a", "b", "c"]} | COARSE | options)


def same(found, expected, rtol=1e-7):
    assert list(found) == list(expected)
    assert found.errors == expected.errors == []
    assert (found.path, found.forwards) == (expected.path, expected.forwards)
    for metric in expected:
        assert found[metric].device.type == "cpu"
        torch.testing.assert_close(found[metric], expected[metric], rtol=rtol, atol=rtol)
        assert all(values.device.type == "cpu" for values in found.details[metric].values())


@pytest.mark.parametrize("path", ["auto", "tokens", "pixels"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_scores(path, pool):
    model, images, maps = given(global_pool=pool)
    expected = judged(model, images, maps, path=path, saco={"impact": "max"})
    assert expected.path == ("pixels" if path == "pixels" else "tokens")
    found = judged(model.cuda(), images.cuda(), maps.cuda(), path=path, saco={"impact": "max"})
    same(found, expected)
    assert found.image_keys == expected.image_keys


@pytest.mark.parametrize("path", ["tokens", "pixels"])
@pytest.mark.parametrize("baseline", [*FILLS, 0.3])
def test_baselines(baseline, path):
    model, images, maps = given()
    expected = judged(model, images, maps, baseline=baseline, path=path)
    same(judged(model.cuda(), images.cuda(), maps, baseline=baseline, path=path), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fill", [torch.tensor(0.2), torch.arange(3.0), torch.arange(9.0).reshape(3, 3)], ids=str)
def test_fills_given_as_tensors(fill, device):
    model, images, maps = given()
    expected = judged(model, images, maps, baseline=fill)
    same(judged(model.cuda(), images.cuda(), maps, baseline=fill.to(device)), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_keys_targets_and_subsets_from_either_device(device):
    model, images, maps = given()
    subsets = torch.rand(2, 5, 3, 24, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4]
    target = torch.tensor([4, 0, 2])

    def options(where):
        return {
            "target": target.to(where),
            "keys": None,
            "faithfulness_correlation": {"subsets": subsets.to(where), "correlation": "pearson"},
        }

    expected = judged(model, images, maps, **options("cpu"))
    found = judged(model.cuda(), images.cuda(), maps.to(device), **options(device))
    same(found, expected)
    assert found.image_keys == expected.image_keys  # made of the pixels


def test_predicted_classes_and_maps_that_are_not_finite():
    model, images, maps = given()
    maps[1, 2, 0, 0] = torch.nan
    expected = judged(model, images, maps, target=None)
    found = judged(model.cuda(), images.cuda(), maps.cuda(), target=None)
    assert found.errors == expected.errors
    assert len(found.errors) == 3
    for metric in expected:
        torch.testing.assert_close(found[metric], expected[metric], rtol=1e-7, atol=1e-7, equal_nan=True)


def test_float32_on_a_card_is_bfloat16_unless_asked_otherwise():
    model, images, maps = given(torch.float32, gain=2)
    expected = judged(model, images, maps)
    model, images = model.cuda(), images.cuda()
    same(judged(model, images, maps, precision="float32"), expected, rtol=1e-4)
    fast = judged(model, images, maps)
    assert fast.path == "tokens"
    assert fast.forwards == expected.forwards
    curve, exact = (s.details["pixel_flipping"]["curve"] for s in (fast, expected))
    assert not torch.equal(curve, exact)
    torch.testing.assert_close(curve, exact, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("path", ["tokens", "pixels"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float8"])
def test_precisions(precision, path):
    model, images, maps = given(torch.float32, gain=2)
    exact = judged(model, images, maps, path=path)
    found = judged(model.cuda(), images.cuda(), maps, precision=precision, path=path)
    curve, close = (s.details["pixel_flipping"]["curve"] for s in (found, exact))
    assert not torch.equal(curve, close)
    torch.testing.assert_close(curve, close, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_halves(dtype):
    model, images, maps = given(dtype, gain=2)
    exact = judged(model.double(), images.double(), maps)
    found = judged(model.to("cuda", dtype), images.cuda(), maps)
    curve, close = (s.details["pixel_flipping"]["curve"] for s in (found, exact))
    torch.testing.assert_close(curve, close, rtol=0.1, atol=0.02)


def test_any_callable():
    def model(images):
        left = images[..., :4].mean((1, 2, 3))
        return torch.stack([left, -left], dim=1)

    images, maps = torch.rand(3, 3, *SIZE), torch.rand(3, 4, 6)
    same(judged(model, images.cuda(), maps), judged(model, images, maps), rtol=1e-5)


def test_arguments_on_another_device_are_named():
    model, images, maps = given()
    with pytest.raises(ValueError, match="images: expected them on cpu, as the model is, got cuda:0"):
        judged(model, images.cuda(), maps)
    with pytest.raises(ValueError, match="images: expected them on cuda:0, as the model is, got cpu"):
        judged(model.cuda(), images, maps)


def test_compare():
    model, images, _ = given()
    sae = random_sae(32, 100, "topk", k=9)
    gates = {
        "vanilla": None,
        "sae": fastfg.Gate((1, 2)),
        "shuffled": fastfg.Gate((2,), shuffle_seed=1),
        "no sae": fastfg.Gate((1,), score="gradient_x_residual"),
    }
    options = {"gates": gates, "keys": ["a", "b", "c"]} | COARSE
    expected = fastfg.compare(model, images, saes={1: sae, 2: sae}, **options)
    there = sae.cuda()
    found = fastfg.compare(model.cuda(), images.cuda(), saes={1: there, 2: there}, **options)
    assert found.drop(columns=list(fastfg.metrics.DEFAULT_METRICS)).equals(
        expected.drop(columns=list(fastfg.metrics.DEFAULT_METRICS))
    )
    for metric in fastfg.metrics.DEFAULT_METRICS:
        assert found[metric].tolist() == pytest.approx(expected[metric].tolist(), rel=1e-6, abs=1e-9)


# Memory ----------------------------------------------------------------------------------------------------------


class Small:
    """A card with memory for a forward of at most ``most`` images. Counts the images of each forward."""

    def __init__(self, model, most):
        self.most, self.sizes = most, []
        self.handle = model.blocks[1].register_forward_pre_hook(self.forward)

    def forward(self, module, args):
        self.sizes.append(len(args[0]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("path", ["tokens", "pixels"])
@pytest.mark.parametrize("most", [2, 11])
def test_a_batch_that_does_not_fit_is_halved(most, path, caplog):
    model, images, maps = given()
    expected = judged(model, images, maps, path=path)
    model = model.cuda()
    before = state_of(model)
    small = Small(model, most)
    same(judged(model, images.cuda(), maps, path=path), expected)
    assert "did not fit into memory" in caplog.text
    assert max(small.sizes) > most
    assert small.sizes[-1] <= most
    small.handle.remove()
    assert_unchanged(before, state_of(model))


def test_one_image_that_does_not_fit_raises_the_devices_error():
    model, images, maps = given()
    Small(model.cuda(), most=0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        judged(model, images.cuda(), maps, path="pixels")


def test_inputs_and_model_are_unchanged():
    model, images, maps = given()
    model, images, maps = model.cuda().train(), images.cuda(), maps.cuda()
    before, kept, kept_maps, fill = state_of(model), images.clone(), maps.clone(), torch.rand(3, 3).cuda()
    kept_fill = fill.clone()
    judged(model, images, maps, baseline=fill)
    assert_unchanged(before, state_of(model))
    assert torch.equal(images, kept)
    assert torch.equal(maps, kept_maps)
    assert torch.equal(fill, kept_fill)
