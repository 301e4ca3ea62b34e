"""Odd but legal inputs to evaluate, and inputs that could be mistaken for something else."""

import pytest
import torch

import fastfg
from tests.tools import tiny_vit


def halves(images):
    left = images[..., : images.shape[-1] // 2].mean((1, 2, 3))
    return torch.stack([left, images.mean((1, 2, 3)) - left], 1)


def test_maps_per_pixel_are_not_read_as_several_maps():
    images = torch.rand(3, 3, 8, 8)
    for maps in (torch.rand(3, 3, 8, 8), torch.rand(3, 8, 8)):
        with pytest.raises(ValueError, match="maps: expected one value per patch, .* got .*, one value per pixel"):
            fastfg.evaluate(halves, images, maps, target=0)


def test_no_images_and_no_maps(model, images):
    none = fastfg.evaluate(model, images[:0], torch.rand(2, 0, 4, 6), target=None)
    assert none["saco"].shape == (2, 0)
    none = fastfg.evaluate(model, images, torch.rand(0, 3, 4, 6), target=1)
    assert none["pixel_flipping"].shape == (0, 3)
    assert none.errors == []


@pytest.mark.parametrize("grid", [(1, 2), (1, 3), (2, 2)])
def test_small_grids_with_the_defaults(grid):
    images = torch.rand(2, 3, 8 * grid[0], 8 * grid[1], dtype=torch.float64)
    weights = torch.arange(1.0, 1 + grid[0] * grid[1]).double()

    def model(images):
        means = images.unflatten(-1, (grid[1], 8)).unflatten(-3, (grid[0], 8)).mean((1, 3, 5)).flatten(1)
        return torch.stack([means @ weights, torch.zeros(len(images)).double()], 1)

    scores = fastfg.evaluate(model, images, weights.reshape(1, *grid).expand(2, -1, -1), target=0, baseline="zero")
    assert scores["pixel_flipping"].isfinite().all()
    assert scores["saco"].isfinite().all()
    assert scores["faithfulness_correlation"].isfinite().all()
    with pytest.raises(ValueError, match="maps: expected at least 2 patches per image, got \\[2, 1, 1\\]"):
        fastfg.evaluate(model, images, torch.rand(2, 1, 1), target=0)


def test_a_default_device_changes_nothing(model, images):
    maps = torch.rand(2, 3, 4, 6)
    options = {"target": [1, 0, 2], "baseline": "noise", "pixel_flipping": {"baseline": "running_mean"}}
    expected = fastfg.evaluate(model, images, maps, **options)
    torch.set_default_device("meta")
    try:
        found = fastfg.evaluate(model, images, maps, **options)
    finally:
        torch.set_default_device(None)
    for metric in expected:
        assert torch.equal(found[metric], expected[metric])


def test_a_model_that_writes_into_its_input_or_output():
    images, maps = torch.rand(20, 3, 8, 8), torch.rand(20, 2, 2)
    kept, buffer = images.clone(), torch.empty(16, 2)

    def careless(images):
        images.mul_(2)
        out = buffer[: len(images)]
        out.copy_(halves(images))
        return out

    found = fastfg.evaluate(careless, images, maps, target=None, baseline="zero")
    assert torch.equal(images, kept)
    expected = fastfg.evaluate(lambda x: halves(2 * x), images, maps, target=None, baseline="zero")
    for metric in expected:
        torch.testing.assert_close(found[metric], expected[metric], equal_nan=True)


def test_border_pixels_that_no_patch_covers():
    """A model may take images whose size is not a multiple of its patch. The remaining border is never perturbed."""
    grid = fastfg.perturb.PatchGrid.of((35, 50), (4, 6), (8, 8))
    assert (grid.bottom, grid.right) == (3, 2)
    pixels = grid.to_pixels(torch.ones(24, dtype=torch.bool))
    assert pixels.shape == (35, 50)
    assert pixels[:32, :48].all()
    assert pixels.sum() == 32 * 48
    image = torch.rand(3, 35, 50, dtype=torch.float64)
    torch.testing.assert_close(grid.sum_pixels(image).sum(), image[:, :32, :48].sum())
    fill = fastfg.perturb.running_mean_fill(image, torch.arange(24), 24, grid)
    torch.testing.assert_close(fill[0, 0, 0], image.mean())


def test_memory_that_holds_two_images_only(images):
    """Views are also prepared in groups that fit into memory."""
    model, maps = tiny_vit(), torch.rand(3, 4, 6)
    expected = fastfg.evaluate(model, images, maps, target=1)
    sizes = []

    def small(module, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("of memory for two")

    model.patch_embed.register_forward_pre_hook(small)
    found = fastfg.evaluate(model, images, maps, target=1)
    assert found.path == "tokens"
    for metric in expected:
        torch.testing.assert_close(found[metric], expected[metric], rtol=1e-9, atol=1e-12)


def test_a_model_that_gives_other_outputs_in_another_batch():
    images, maps = torch.rand(3, 3, 8, 8), torch.rand(3, 2, 2)
    torch.manual_seed(0)
    for model in (
        lambda x: torch.nn.functional.dropout(halves(x), 0.5),
        lambda x: torch.nn.functional.batch_norm(halves(x), None, None, training=True),
    ):
        with pytest.raises(ValueError, match="model: expected the same output for an image in every batch, got"):
            fastfg.evaluate(model, images, maps, target=0)


def test_a_callers_autocast_does_not_change_scores(images):
    model, maps = tiny_vit(dtype=torch.float32), torch.rand(3, 4, 6)
    expected = fastfg.evaluate(model, images.float(), maps, target=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = fastfg.evaluate(model, images.float(), maps, target=1)
    for metric in expected:
        assert torch.equal(found[metric], expected[metric])


def test_keys_may_be_numbers_of_any_kind(model, images):
    maps = torch.rand(3, 4, 6)
    options = {"target": 1, "metrics": ["faithfulness_correlation"]}
    expected = fastfg.evaluate(model, images, maps, keys=[0, 1, 2], **options)
    found = fastfg.evaluate(model, images, maps, keys=torch.arange(3), **options)
    assert found.image_keys == expected.image_keys == ["0", "1", "2"]
    assert torch.equal(found["faithfulness_correlation"], expected["faithfulness_correlation"])
