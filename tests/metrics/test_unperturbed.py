"""A model that does not give an image the same output in every batch is refused."""

import pytest
import torch

import fastfg
from fastfg.metrics.unperturbed import same_within
from tests.tools import tiny_vit

OTHER = "model: expected the same output for an image in every batch, got a difference of"


def mixes(module, args, output):
    return output - 0.9 * output.mean(0, keepdim=True)


def drops(module, args):
    return torch.nn.functional.dropout(args[0], 0.3, training=True)


def evaluated(model, images, **options):
    maps = torch.rand(len(images), 4, 6, generator=torch.Generator().manual_seed(0))
    return fastfg.evaluate(model, images, maps, target=1, **{"metrics": ["saco"]} | options)


@pytest.mark.parametrize("batch_size", [16, 3, 2])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 1], [0], [0, 0]])
def test_a_model_of_a_known_family_whose_hook_mixes_images(model, images, chosen, batch_size):
    model.head.register_forward_hook(mixes)
    for given in (model, lambda x: model(x)):
        with pytest.raises(ValueError, match=OTHER):
            evaluated(given, images[chosen], batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [16, 1])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [0], [0, 0]])
def test_a_model_of_a_known_family_that_always_drops(model, images, chosen, batch_size):
    model.head.register_forward_pre_hook(drops)
    with pytest.raises(ValueError, match=OTHER):
        evaluated(model, images[chosen], batch_size=batch_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_in_half_precision(images, dtype):
    model = tiny_vit(dtype=dtype)
    assert evaluated(model, images.to(dtype)).path == "tokens"
    model.head.register_forward_hook(mixes)
    with pytest.raises(ValueError, match=OTHER):
        evaluated(model, images[:1].to(dtype))


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float8"])
def test_the_same_in_a_reduced_precision(images, precision):
    model = tiny_vit(dtype=torch.float32)
    assert evaluated(model, images.float(), precision=precision).path == "tokens"
    model.head.register_forward_hook(mixes)
    with pytest.raises(ValueError, match=OTHER):
        evaluated(model, images[:1].float(), precision=precision)


@pytest.mark.parametrize("chosen", [[0], [0, 0]])
def test_batch_norm_in_training_mode_and_one_image(images, chosen):
    torch.manual_seed(0)
    norm, layer = torch.nn.BatchNorm2d(8).double(), torch.nn.Conv2d(3, 8, 8, 8).double()
    norm.train()
    with pytest.raises(ValueError, match=OTHER):
        evaluated(lambda x: norm(layer(x)).relu().mean((2, 3)), images[chosen])


def test_an_output_that_another_image_makes_nan(images):
    def model(x):
        means = x.mean((1, 2, 3))
        return torch.stack([means, -means], 1) + torch.where((means - means[0]).abs().amax() > 1e-6, torch.nan, 0.0)

    with pytest.raises(ValueError, match=OTHER):
        evaluated(model, images[:1])


def test_no_batch_is_larger_than_batch_size(model, images):
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for batch_size in (1, 2, 3):
        sizes.clear()
        evaluated(model, images, path="pixels", batch_size=batch_size)
        assert max(sizes) == batch_size


def test_memory_that_holds_one_image_only(images):
    def small(x):
        if len(x) > 1:
            raise torch.OutOfMemoryError("of memory for one")
        return x.unflatten(-1, (2, -1)).mean((1, 2, 4))

    assert evaluated(small, images[:1]).errors == []


def test_logits_near_zero_in_half_precision_are_no_reason_to_refuse(images):
    """They are rounding, and another kernel rounds in another place."""
    calls = []

    def model(x):
        calls.append(len(x))
        z = (0.02 * x.mean((1, 2, 3)) + 0.003 * (len(calls) % 2)).bfloat16()
        return torch.stack([z, torch.zeros_like(z)], 1)

    evaluated(model, images[:1])


def test_how_far_outputs_may_differ():
    assert [same_within(torch.finfo(dtype).eps) for dtype in (torch.float64, torch.float32)] == [0.01, 0.01]
    assert same_within(torch.finfo(torch.float16).eps) == 0.05
    assert same_within(torch.finfo(torch.bfloat16).eps) == 0.0625
    assert same_within(torch.finfo(torch.float8_e4m3fn).eps) == 0.1
