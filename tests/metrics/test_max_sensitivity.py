"""Max-Sensitivity: toys, a loop over single images and noises, Quantus, and cases without a score."""

import warnings

import numpy as np
import pytest
import torch

import fastfg
from fastfg.metrics import MaxSensitivity, relative_change
from fastfg.perturb import generator
from tests.metrics.explain_again import contributions, toy, vanilla

OPTIONS = {"metrics": ["max_sensitivity"], "seed": 3}


def noise(key, number, image, radius, seed=3):
    random = generator(seed, key, f"max_sensitivity noise {number}")
    return radius * (2 * torch.rand(image.shape, generator=random, dtype=torch.float64) - 1)


def test_by_hand():
    assert float(relative_change([3.0, 4.0], [3.0, 1.5])) == 0.5
    assert float(relative_change(torch.tensor([3e-200, 4e-200], dtype=torch.float64), [0.0, 0.0])) == 1.0
    assert relative_change([[1.0, 0.0]], [[[1.0, 1.0], [3.0, 0.0]]]).tolist() == [[1.0, 2.0]]
    scores, details = MaxSensitivity().compare(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 1.0], [3.0, 0.0]]]), [])
    assert (scores.tolist(), details["change"].tolist()) == ([2.0], [[1.0, 2.0]])


def test_equals_the_loop(model, images):
    target = torch.tensor([1, 0, 4])
    maps = fastfg.attribute(model, images, target=target).maps
    options = {"n_samples": 3, "radius": 0.3}
    found = fastfg.evaluate(
        model, images, maps, target=target, keys=[*"abc"], explain=vanilla, max_sensitivity=options, **OPTIONS
    )
    for i, key in enumerate("abc"):
        changes = []
        for j in range(3):
            x = images[i] + noise(key, j, images[i], 0.3)
            made = fastfg.attribute(model, x[None], target=target[[i]]).maps[0]
            changes.append(float((made - maps[i]).norm() / maps[i].norm()))
        assert found["max_sensitivity"][i].item() == pytest.approx(max(changes), rel=1e-9)
        assert found.details["max_sensitivity"]["change"][i].tolist() == pytest.approx(changes, rel=1e-9)
    assert found.errors == []
    assert found.forwards["attributions"] == 3 * (1 + 3)


def test_a_linear_model():
    """The contributions are linear in the image: their change is the contributions of the noise."""
    model, images, maps = toy()
    found = fastfg.evaluate(model, images, maps, target=0, keys=[*"abc"], explain=contributions, **OPTIONS)
    for i, key in enumerate("abc"):
        noises = torch.stack([noise(key, j, images[i], 0.2) for j in range(10)])
        change = contributions(model, noises, [0] * 10).flatten(1).norm(dim=1).max() / maps[i].norm()
        assert found["max_sensitivity"][i].item() == pytest.approx(float(change), rel=1e-9)


def test_equals_quantus():
    quantus = pytest.importorskip("quantus")
    model, images, maps = toy()
    found = fastfg.evaluate(model, images, maps, target=0, keys=[*"abc"], explain=contributions, **OPTIONS)
    number = iter(range(10))

    def perturb(arr, **kwargs):
        j = next(number)
        noises = [noise(key, j, image, 0.2).flatten() for key, image in zip("abc", images, strict=True)]
        return arr + torch.stack(noises).numpy()

    def explain(model, inputs, targets, **kwargs):
        made = contributions(model, torch.as_tensor(inputs), torch.as_tensor(targets))
        return large(made).numpy()

    def large(maps):
        return maps.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = quantus.MaxSensitivity(nr_samples=10, perturb_func=perturb, disable_warnings=True)
        expected = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=np.zeros(3, dtype=int),
            a_batch=large(maps).numpy(),
            explain_func=explain,
            device="cpu",
        )
    assert found["max_sensitivity"].tolist() == pytest.approx([float(e) for e in expected], rel=1e-6)


def test_alone_and_in_any_batch_and_for_several_maps():
    model, images, maps = toy(n=11)
    keys = [str(i) for i in range(11)]
    options = OPTIONS | {"target": 0}

    def two(model, images, target):
        made = contributions(model, images, target)
        return torch.stack([made, made.square()])

    both = torch.stack([maps, maps.square()])
    found = fastfg.evaluate(model, images, both, keys=keys, explain=two, batch_size=3, **options)["max_sensitivity"]
    assert found.shape == (2, 11)
    for i in (0, 10):
        rows = slice(i, i + 1)
        alone = fastfg.evaluate(model, images[rows], maps[rows], keys=keys[rows], explain=contributions, **options)
        assert alone["max_sensitivity"].item() == pytest.approx(found[0, i].item(), rel=1e-12)


def test_cases_without_a_score_and_with_one():
    model, images, maps = toy()
    maps, images = maps.clone(), images.clone()
    maps[0], maps[1, 0, 0], images[2] = 1.0, torch.nan, 0.7  # constant, NaN, a blank image
    maps[2] = contributions(model, images[2:], [0])[0]
    found = fastfg.evaluate(model, images, maps, target=0, explain=contributions, **OPTIONS)
    assert [e.message for e in found.errors] == [
        "the attribution is the same for every patch",
        "the attribution is not finite",
    ]
    assert found["max_sensitivity"].isfinite().tolist() == [False, False, True]
    first = maps[2:]

    def breaks(model, images, target):
        made = contributions(model, images, target)
        return torch.where((made == first).flatten(1).all(1)[:, None, None], made, torch.nan)

    found = fastfg.evaluate(model, images[2:], first, target=0, explain=breaks, **OPTIONS)
    assert [e.message for e in found.errors] == ["the attribution is not finite under noise on the image"]
    assert found["max_sensitivity"].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "max_sensitivity: expected n_samples >= 1, an integer, got 0"),
        ({"radius": 0}, "max_sensitivity: expected radius > 0, a finite number, got 0"),
        ({"radius": float("inf")}, "max_sensitivity: expected radius > 0, a finite number, got inf"),
        ({"baseline": "zero"}, "max_sensitivity: expected no baseline, as no patch is removed, got 'zero'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaxSensitivity(**options)
