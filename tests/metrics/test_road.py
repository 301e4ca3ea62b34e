"""ROAD: by hand, one image at a time, and the baseline ``imputed`` for other metrics."""

import pytest
import torch

import fastfg
from fastfg.perturb import PatchGrid, generator
from fastfg.perturb.imputation import impute

MAPS = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def reader(model, images, keys, seed=0):
    """Readings of single images, imputed one mask at a time."""
    grid = PatchGrid(4, 6, 8, 8)

    @torch.no_grad()
    def read(i, removed):
        mask = torch.zeros(1, 24, dtype=torch.bool)
        mask[0, removed] = True
        image = impute(images[i], mask, grid, generator(seed, keys[i], "baseline")) if removed else images[i][None]
        return model(image).softmax(1)[0, 2].item()

    return read


def test_one_image_at_a_time(model, images):
    keys = ["a", "b", "c"]
    found = fastfg.evaluate(model, images, MAPS, target=2, metrics=["road"], keys=keys)
    assert found.errors == []
    read = reader(model, images, keys)
    for c in range(2):
        for i in range(3):
            order = MAPS[c, i].flatten().argsort(descending=True, stable=True).tolist()
            counts = [round(share / 10 * 24) for share in range(1, 10)]
            mif = [read(i, order[:n]) for n in counts]
            lif = [read(i, order[24 - n :]) for n in counts]
            expected = sum(b - a for a, b in zip(mif, lif, strict=True)) / 9
            assert float(found["road"][c, i]) == pytest.approx(expected, rel=1e-7, abs=1e-10)
            assert found.details["road"]["mif"][c, i].tolist() == pytest.approx(mif, rel=1e-7)
    assert found.details["road"]["share"][0, 0].tolist() == pytest.approx([n / 24 for n in counts])


def test_a_perfect_and_an_inverted_map():
    """A model that sees the left half alone: the map of the left half has a high score, the other the same below 0."""
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[..., :8] += 1

    def model(images):
        z = images[..., :8].mean((1, 2, 3)) - 1
        return torch.stack([z, -z], 1)

    columns = torch.tensor([4.0, 3, 2, 1]).expand(1, 2, 4, 4)
    maps = torch.cat([columns, -columns]).contiguous()
    found = fastfg.evaluate(model, images, maps, target=0, metrics=["road"], road={"shares": 0.5})["road"]
    assert (found[0] > 0.1).all()
    torch.testing.assert_close(found[0], -found[1])


def test_imputed_is_a_baseline_of_every_metric(model, images):
    keys = ["a", "b", "c"]
    options = {"target": 2, "keys": keys, "pixel_flipping": {"patches_per_step": 6}}
    found = fastfg.evaluate(model, images, MAPS[0], metrics=["pixel_flipping", "road"], baseline="imputed", **options)
    read = reader(model, images, keys)
    for i in range(3):
        order = MAPS[0, i].flatten().argsort(descending=True, stable=True).tolist()
        curve = [read(i, order[:n]) for n in (0, 6, 12, 18, 24)]
        assert found.details["pixel_flipping"]["curve"][i].tolist() == pytest.approx(curve, rel=1e-7)
    own = fastfg.evaluate(model, images, MAPS[0], metrics=["pixel_flipping", "road"], **options)
    assert not torch.allclose(own["pixel_flipping"], found["pixel_flipping"])
    torch.testing.assert_close(own["road"], found["road"])


def test_alone_or_in_any_batch(model, images):
    options = {"target": 2, "metrics": ["road"]}
    together = fastfg.evaluate(model, images, MAPS[0], keys=["a", "b", "c"], **options)["road"]
    alone = fastfg.evaluate(model, images[1:2], MAPS[0, 1:2], keys=["b"], **options)["road"]
    assert float(alone) == pytest.approx(float(together[1]), rel=1e-7)


def test_what_has_no_score(model, images):
    maps = MAPS[0].clone()
    maps[0], maps[1, 0, 0] = 1.0, torch.nan
    images = images.clone()
    images[2] = 0.5
    found = fastfg.evaluate(model, images, maps, target=2, metrics=["road"])
    assert [error.message for error in found.errors] == [
        "the attribution is the same for every patch",
        "the attribution is not finite",
        "the image is blank: all its pixels are the same",
    ]
    assert found["road"].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "road: expected baseline='imputed', which defines it, got 'mean'"),
        ({"shares": [0.5, 1.0]}, "road: expected shares between 0 and 1"),
        ({"shares": []}, "road: expected shares between 0 and 1"),
    ],
)
def test_wrong_options(model, images, options, message):
    with pytest.raises(ValueError, match=message):
        fastfg.evaluate(model, images, MAPS[0], target=2, metrics=["road"], road=options)
