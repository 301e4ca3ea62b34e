"""Noisy linear imputation by hand, against a dense system pixel by pixel, and against Quantus."""

import numpy as np
import pytest
import torch

from fastfg.perturb import PatchGrid, generator
from fastfg.perturb.imputation import impute


def by_loop(image, removed):
    """One dense system: each removed pixel is the weighted mean of the neighbours that lie inside the image."""
    C, H, W = image.shape
    matrix, right = np.eye(H * W), image.reshape(C, -1).numpy().T.copy()
    for y in range(H):
        for x in range(W):
            if not removed[y, x]:
                continue
            weights = {}
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if (dy or dx) and 0 <= y + dy < H and 0 <= x + dx < W:
                        weights[(y + dy) * W + x + dx] = 1 / 12 if dy and dx else 1 / 6
            right[y * W + x] = 0
            for j, weight in weights.items():
                matrix[y * W + x, j] -= weight / sum(weights.values())
    return torch.from_numpy(np.linalg.solve(matrix, right).T.reshape(C, H, W))


def random_masks(m, P, seed=0):
    draw = torch.Generator().manual_seed(seed)
    masks = torch.stack([torch.rand(P, generator=draw) < (k + 1) / (m + 1) for k in range(m)])
    masks[:, 0] = False
    return masks


@pytest.fixture
def image():
    return torch.randn(3, 14, 19, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_one_pixel_by_hand():
    image = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 50.0, 6.0], [7.0, 8.0, 9.0]]])
    masks = torch.zeros(2, 9, dtype=torch.bool)
    masks[0, 4] = masks[1, 0] = True
    filled, corner = impute(image, masks, PatchGrid(3, 3, 1, 1), torch.Generator(), noise=0.0)[:, 0]
    assert float(filled[1, 1]) == pytest.approx((2 + 4 + 6 + 8) / 6 + (1 + 3 + 7 + 9) / 12)
    assert float(corner[0, 0]) == pytest.approx((2 / 6 + 4 / 6 + 50 / 12) / (1 / 6 + 1 / 6 + 1 / 12))
    assert filled.flatten()[[0, 1, 2, 3, 5, 6, 7, 8]].tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_two_removed_neighbours_by_hand():
    """x = (0 + y) / 2 and y = (x + 3) / 2 give 1 and 2."""
    row, mask = torch.tensor([[[0.0, 9.0, 9.0, 3.0]]]), torch.tensor([[False, True, True, False]])
    filled = impute(row, mask, PatchGrid(1, 4, 1, 1), torch.Generator(), noise=0.0)
    torch.testing.assert_close(filled[0, 0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "grid",
    [PatchGrid(7, 19, 2, 1), PatchGrid(3, 4, 4, 4, 2, 3), PatchGrid(2, 2, 7, 9, 0, 1)],
    ids=["small patches", "a border of no patch", "large patches"],
)
def test_equals_the_dense_system(image, grid):
    masks = random_masks(6, grid.n_patches)
    found = impute(image, masks, grid, torch.Generator(), noise=0.0)
    for mask, one in zip(masks, found, strict=True):
        torch.testing.assert_close(one, by_loop(image, grid.to_pixels(mask)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (2, 2), (9, 33)])
def test_thin_images(size):
    image, grid = torch.randn(2, *size, dtype=torch.float64), PatchGrid(*size, 1, 1)
    masks = random_masks(5, grid.n_patches, seed=1)
    for mask, one in zip(masks, impute(image, masks, grid, torch.Generator(), noise=0.0), strict=True):
        torch.testing.assert_close(one, by_loop(image, grid.to_pixels(mask)), rtol=0, atol=1e-11)


def test_equals_quantus(image):
    perturb = pytest.importorskip("quantus.functions.perturb_func")
    grid = PatchGrid(14, 19, 1, 1)
    masks = random_masks(4, grid.n_patches, seed=2)
    for mask, one in zip(masks, impute(image, masks, grid, torch.Generator(), noise=0.0), strict=True):
        indices = mask.nonzero().flatten().numpy()
        expected = perturb.noisy_linear_imputation(image.numpy().copy(), indices, noise=0.0)
        torch.testing.assert_close(one, torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_nothing_and_everything_removed(image):
    grid = PatchGrid(7, 19, 2, 1)
    masks = torch.stack([torch.zeros(grid.n_patches), torch.ones(grid.n_patches)]).bool()
    nothing, everything = impute(image, masks, grid, torch.Generator(), noise=0.0)
    assert torch.equal(nothing, image)
    torch.testing.assert_close(everything, image.mean((1, 2), keepdim=True).expand_as(image))
    assert impute(image, masks[:0], grid, torch.Generator()).shape == (0, *image.shape)


def test_noise_depends_on_seed_and_key_alone(image):
    grid = PatchGrid(3, 4, 4, 4, 2, 3)
    masks = random_masks(5, grid.n_patches)
    smooth = impute(image, masks, grid, torch.Generator(), noise=0.0)
    random = generator(0, "a", "imputation")
    noisy = impute(image, masks, grid, random)
    assert torch.equal(noisy, impute(image, masks, grid, random))  # the generator is left as it was
    assert torch.equal(noisy[3:4], impute(image, masks[3:4], grid, random))
    assert not torch.equal(noisy, impute(image, masks, grid, generator(0, "b", "imputation")))
    assert not torch.equal(noisy, impute(image, masks, grid, generator(1, "a", "imputation")))
    pixels = grid.to_pixels(masks).unsqueeze(1).expand_as(noisy)
    assert torch.equal(noisy[~pixels], smooth[~pixels])
    drawn = noisy - smooth
    for i in range(5):  # one draw per pixel, whatever the mask
        both = pixels[0] & pixels[i]
        torch.testing.assert_close(drawn[0][both], drawn[i][both], rtol=0, atol=1e-12)
    large = torch.zeros(3, 60, 60, dtype=torch.float64)
    spread = impute(large, torch.ones(1, 36).bool(), PatchGrid(6, 6, 10, 10), random).std()
    assert float(spread) == pytest.approx(0.01, rel=0.05)


def test_single_precision_is_the_rounded_double(image):
    grid = PatchGrid(3, 4, 4, 4, 2, 3)
    masks, single = random_masks(3, grid.n_patches), image.float()
    found = impute(single, masks, grid, torch.Generator())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, impute(single.double(), masks, grid, torch.Generator()).float(), rtol=0, atol=0)
