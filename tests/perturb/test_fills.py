"""The fills of removed patches, and the drifting mean against the loop that it replaces."""

import pytest
import torch

from fastfg.perturb import PatchGrid, make_fill, running_mean_fill
from fastfg.perturb.fills import blur

GRID = PatchGrid(2, 3, 4, 5)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


@pytest.fixture
def image():
    return torch.randn(3, 8, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fill(baseline, image, seed=0, index=0):
    return make_fill(baseline, image, index, GRID, torch.Generator().manual_seed(seed), MEAN, STD)


def test_constants(image):
    assert float(fill("mean", image)) == pytest.approx(float(image.mean()))
    torch.testing.assert_close(fill("channel_mean", image).flatten(), image.mean((1, 2)))
    assert fill("zero", image).eq(0).all()
    torch.testing.assert_close(fill("black", image).flatten(), torch.tensor([-2.0, -2.0, -1.2]).double())
    torch.testing.assert_close(fill("white", image).flatten(), torch.tensor([3.0, 2.0, 0.8]).double())
    assert float(fill(0.25, image)) == 0.25
    assert float(fill(torch.tensor([1.0, 2.0]), image, index=1)) == 2.0
    colours = torch.arange(6.0).reshape(2, 3)
    assert fill(colours, image, index=1).flatten().tolist() == [3.0, 4.0, 5.0]


def test_noise_is_seeded_and_looks_like_the_image():
    image = torch.randn(3, 80, 150, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1) + 5
    noise = fill("noise", image)
    assert torch.equal(noise, fill("noise", image))
    assert not torch.equal(noise, fill("noise", image, seed=1))
    torch.testing.assert_close(noise.std((1, 2)), image.std((1, 2)), rtol=0.05, atol=0)
    torch.testing.assert_close(noise.mean((1, 2)), image.mean((1, 2)), rtol=0.05, atol=0)


def test_blur_against_scipy(image):
    from scipy.ndimage import gaussian_filter

    expected = gaussian_filter(image.numpy(), sigma=(0, 5, 5), mode="nearest", radius=(0, 15, 15))
    torch.testing.assert_close(blur(image, 5), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patches_per_step", [1, 2, 4])
def test_running_mean_equals_the_loop(image, patches_per_step):
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    filled = running_mean_fill(image, order, patches_per_step, GRID)
    perturbed = image.clone()
    for start in range(0, 6, patches_per_step):
        mean = perturbed.mean()
        for patch in order[start : start + patches_per_step].tolist():
            row, column = divmod(patch, 3)
            perturbed[:, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5] = mean
        mask = torch.zeros(6, dtype=torch.bool).index_fill_(0, order[: start + patches_per_step], True)
        ours = torch.where(GRID.to_pixels(mask), filled, image)
        torch.testing.assert_close(ours, perturbed, rtol=1e-12, atol=1e-12)


def test_patches_and_pixels(image):
    pixels = GRID.to_pixels(torch.arange(6))
    assert pixels.shape == (8, 15)
    assert pixels[0, 0] == 0
    assert pixels[3, 5] == 1
    assert pixels[4, 0] == 3
    assert pixels[7, 14] == 5
    sums = torch.stack([(image * (pixels == i)).sum() for i in range(6)])
    torch.testing.assert_close(GRID.sum_pixels(image), sums)
