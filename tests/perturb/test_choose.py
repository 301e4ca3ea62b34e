"""Tokens are perturbed instead of pixels only if that gives the same logits for the evaluated images."""

import pytest
import torch

import fastfg
from fastfg.perturb import PatchGrid
from fastfg.perturb.masks import asymmetric_halves
from tests.tools import tiny_vit

MAPS = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(4))


def same(model, images, **options):
    """Assert that the chosen path gives the same scores as pixels. Returns the path's name."""
    found = fastfg.evaluate(model, images, MAPS, target=1, **options)
    expected = fastfg.evaluate(model, images, MAPS, target=1, path="pixels", **options)
    for metric in expected:
        torch.testing.assert_close(found[metric], expected[metric], rtol=1e-6, atol=1e-6)
    return found.path


def widen(model, gain=1.0):
    """Overlapping patches: each patch reads two pixels of its neighbours."""
    stem = model.patch_embed.proj
    wide = torch.nn.Conv2d(3, stem.out_channels, 12, stride=8, padding=2)
    wide.weight.data.mul_(gain)
    model.patch_embed.proj = wide.to(stem.weight.dtype)


def test_a_stem_that_changes_after_the_first_evaluation(model, images):
    assert same(model, images) == "tokens"
    widen(model)
    assert same(model, images).startswith(
        "pixels (perturbing pixels changes tokens of patches that are not removed, by"
    )


def test_weights_that_change_after_the_first_evaluation(model, images):
    assert same(model, images) == "tokens"
    model.patch_embed.norm = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.LayerNorm(24 * 32).double())
    model.patch_embed.norm.append(torch.nn.Unflatten(1, (24, 32)))  # every token depends on all of them
    assert same(model, images).startswith("pixels (")


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_an_overlapping_stem_under_bfloat16(images, gain):
    model = tiny_vit(dtype=torch.float32)
    widen(model, gain)
    assert same(model, images.float(), precision="bfloat16").startswith("pixels (")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_overlapping_stem_of_a_model_in_halves(images, dtype):
    model = tiny_vit(dtype=dtype)
    assert fastfg.evaluate(model, images.to(dtype), MAPS, target=1, metrics=["saco"]).path == "tokens"
    widen(model)
    found = fastfg.evaluate(model, images.to(dtype), MAPS, target=1, metrics=["saco"])
    assert found.path.startswith("pixels (")


def test_a_model_that_treats_one_image_differently(images):
    class Picky(type(tiny_vit())):
        def forward(self, x):
            bright = (x.amax((1, 2, 3)) > 6)[:, None]
            logits = super().forward(x)
            return torch.where(bright, -logits, logits)

    model = tiny_vit()
    model.__class__ = Picky
    assert same(model, images.clamp(-3, 3)) == "tokens"
    images = images.clamp(-3, 3)
    images[2, :, -1, -1] = 7.0
    assert same(model, images).startswith(
        "pixels (perturbing its tokens gives logits that differ from those of the pixels"
    )


def test_a_path_around_the_tokens_under_bfloat16(images):
    """The logits are compared in the model's own dtype, not in the evaluation's."""

    class Side(type(tiny_vit())):
        def forward(self, x):
            side = 0.6 * x.mean((2, 3)).sum(1, keepdim=True).tanh()
            return (
                0.05 * super().forward(x) + torch.tensor([2.0, 15, 0, 0, 0]) + side * torch.tensor([1, -1, 0.5, 0, 0])
            )

    model = tiny_vit(dtype=torch.float32)
    model.__class__ = Side
    found = fastfg.evaluate(model, images.float(), MAPS, target=0, precision="bfloat16", baseline="zero")
    assert found.path.startswith("pixels (perturbing its tokens gives logits that differ from those of the pixels")


def test_a_model_that_treats_images_under_this_fill_differently(images):
    """Images are compared under the fills of the evaluation, not under their mean alone."""

    class Rescales(type(tiny_vit())):
        def forward(self, x):
            return super().forward(torch.where(x.amax((1, 2, 3), keepdim=True) > 5, x / 255, x))

    model = tiny_vit()
    model.__class__ = Rescales
    assert same(model, images.clamp(-3, 3)) == "tokens"
    assert same(model, images.clamp(-3, 3), baseline=6.0).startswith("pixels (")


def test_logits_near_zero_under_one_mask_are_compared_with_the_others(images):
    """Rounding is relative to the model's logits, not to those that happen to cancel."""
    model, images = tiny_vit(dtype=torch.float32), images[:1].float()
    grid = PatchGrid.of((32, 48), (4, 6))
    removed = grid.to_pixels(asymmetric_halves(4, 6)[1])
    offset = model(torch.where(removed, images.mean(), images)).detach()

    class Shifted(type(model)):
        def forward(self, x):
            return super().forward(x) - offset

    model.__class__ = Shifted
    assert fastfg.evaluate(model, images, MAPS[:1], target=1, metrics=["saco"]).path == "tokens"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_head_stays_in_float32_on_each_path(images, precision):
    model, seen = tiny_vit(dtype=torch.float32), []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    options = {"target": 1, "precision": precision, "metrics": ["saco", "road"]}
    for path in ("tokens", "pixels"):
        found = fastfg.evaluate(model, images.float(), MAPS, path=path, **options)
        expected = fastfg.evaluate(model, images.float(), MAPS, path=path, **options | {"precision": "float32"})
        torch.testing.assert_close(found["road"], expected["road"], atol=0.05, rtol=0)
    assert set(seen) == {torch.float32}


TURNS = {
    "left and right": lambda x: x.flip(-1),
    "up and down": lambda x: x.flip(-2),
    "half a turn": lambda x: x.flip(-1, -2),
    "transposed": lambda x: x.mT,
    "a quarter turn": lambda x: x.rot90(1, (-2, -1)),
    "moved by a patch": lambda x: x.roll(8, -1),
}


def turned(name, gh, gw, **options):
    """A model that turns its input before it looks at it."""
    model = tiny_vit(img_size=(8 * gh, 8 * gw), **options)

    class Turned(type(model)):
        def forward(self, x):
            return super().forward(TURNS[name](x))

    model.__class__ = Turned
    return model


@pytest.mark.parametrize("grid", [(4, 7), (4, 4), (2, 2), (1, 2), (8, 3)])
@pytest.mark.parametrize("name", TURNS)
def test_a_model_that_turns_its_input(name, grid):
    if grid[0] != grid[1] and name in ("transposed", "a quarter turn"):
        return  # the model takes images of one shape
    if grid[0] == 1 and name == "up and down":
        return  # within a patch: the order is the same
    model = turned(name, *grid)
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1], dtype=torch.float64)
    options = {"target": 1, "metrics": ["pixel_flipping"]}
    maps = torch.rand(2, *grid)
    assert fastfg.evaluate(model, images, maps, **options).path.startswith("pixels (perturbing pixels changes tokens")
    with pytest.raises(ValueError, match="got 'removed': its tokens are not in the order of the image's patches"):
        fastfg.evaluate(model, images, maps, baseline="removed", **options)
