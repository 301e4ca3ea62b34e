"""The metrics of curves: by hand, one image at a time, against Quantus, and at the edges."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

import fastfg
from fastfg.metrics import METRICS
from fastfg.metrics.curves import mean_height, normalised
from fastfg.perturb import Readings

CURVES = ["deletion", "insertion", "srg", "aopc", "comprehensiveness", "sufficiency", "monotonicity"]


def additive(weights, link=None):
    """A model whose logit is the weighted sum of the brightness of its patches of 2 x 2 pixels in one row."""
    w = torch.tensor(weights, dtype=torch.float64)

    def model(images):
        patches = images.unflatten(-1, (len(weights), 2)).mean((1, 2, 4))
        z = (patches * w).sum(1)
        return torch.stack([z, torch.zeros_like(z)], 1)

    return model


def row(values):
    """A map [1, 1, P]."""
    return torch.tensor(values, dtype=torch.float64)[None, None]


def ones(n_patches):
    image = torch.ones(1, 1, 2, 2 * n_patches, dtype=torch.float64)
    image[..., 0, 0] += 1e-12  # not blank
    return image


def scores(weights, map_, metrics=CURVES, **options):
    """Scores of a map for the logit of the additive model, with zero as the baseline."""
    images, target = ones(len(weights)), fastfg.Target(0, link=None)
    options = {"metrics": metrics, "baseline": "zero"} | options
    return fastfg.evaluate(additive(weights), images, row(map_), target=target, **options)


def test_by_hand():
    """Weights 4, 3, 2, 1 and a perfect map: the curves are 10 6 3 1 0 (MIF) and 10 9 7 4 0 (LIF)."""
    found = scores([4, 3, 2, 1], [4.0, 3, 2, 1], comprehensiveness={"k": [0.25, 0.5]}, sufficiency={"k": 0.5})
    assert found.errors == []
    mif, lif = [10, 6, 3, 1, 0], [10, 9, 7, 4, 0]
    torch.testing.assert_close(found.details["deletion"]["curve"][0], torch.tensor(mif).double())
    torch.testing.assert_close(found.details["srg"]["lif"][0], torch.tensor(lif).double())
    assert found.details["srg"]["x"].tolist() == [[0, 0.25, 0.5, 0.75, 1]]
    assert float(found["deletion"]) == pytest.approx((8 + 4.5 + 2 + 0.5) / 4)
    assert float(found["insertion"]) == pytest.approx((9.5 + 8 + 5.5 + 2) / 4)
    assert float(found["srg"]) == pytest.approx(6.25 - 3.75)
    assert float(found.details["deletion"]["normalised"]) == pytest.approx(0.375)
    assert float(found["aopc"]) == pytest.approx((0 + 4 + 7 + 9 + 10) / 5)
    assert float(found["comprehensiveness"]) == pytest.approx((4 + 7) / 2)
    assert found.details["comprehensiveness"]["drop"].tolist() == [pytest.approx([4, 7])]
    assert float(found["sufficiency"]) == pytest.approx(10 - 7)
    assert float(found["monotonicity"]) == 1.0
    assert found.details["monotonicity"]["monotonic"].tolist() == [1.0]


def test_a_map_that_is_upside_down():
    found = scores([4, 3, 2, 1], [1.0, 2, 3, 4])
    assert float(found["srg"]) == pytest.approx(3.75 - 6.25)
    found = scores([4, -3, 2, 1], [4.0, 3, 2, 1], metrics=["monotonicity"])  # one step of four lowers it
    assert float(found["monotonicity"]) == 0.75
    assert found.details["monotonicity"]["monotonic"].tolist() == [0.0]


def test_steps_that_do_not_divide_the_patches():
    """Steps of 3 over 4 patches: removed 0, 3, 4. The LIF curve has the same shares as the MIF curve."""
    step = {"patches_per_step": 3}
    found = scores([4, 3, 2, 1], [4.0, 3, 2, 1], metrics=["srg", "insertion"], srg=step, insertion=step)
    details = found.details["srg"]
    assert details["x"].tolist() == [[0, 0.75, 1]]
    assert details["mif"].tolist() == [pytest.approx([10, 1, 0])]
    assert details["lif"].tolist() == [pytest.approx([10, 4, 0])]
    expected = (5.5 * 0.75 + 0.5 * 0.25), (7 * 0.75 + 2 * 0.25)
    assert float(found["srg"]) == pytest.approx(expected[1] - expected[0])
    assert float(found["insertion"]) == pytest.approx(expected[1])


def test_insertion_is_the_lif_curve_read_backwards():
    """Restoring step by step, most important first, with ties: the same images and the same area."""
    weights, tied = [4, 3, 2, 1, 5], [2.0, 2, 1, 2, 1]
    found = scores(weights, tied, metrics=["insertion"])
    order, kept, curve = [0, 1, 3, 2, 4], set(), [0.0]  # ties by patch index
    for patch in order:
        kept.add(patch)
        curve.append(float(sum(weights[p] for p in kept)))
    assert found.details["insertion"]["curve"].flip(1).tolist() == [pytest.approx(curve)]
    area = sum((a + b) / 2 for a, b in pairwise(curve)) / 5
    assert float(found["insertion"]) == pytest.approx(area)


@pytest.mark.parametrize("step", [1, 5, 23])
def test_one_image_at_a_time(model, images, step):
    """Every score of a real model against forwards of single images, filled by hand."""
    maps = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    options = {name: {"patches_per_step": step} for name in ("deletion", "insertion", "srg", "aopc", "monotonicity")}
    found = fastfg.evaluate(model, images, maps, target=2, metrics=CURVES, **options)
    assert found.errors == []

    @torch.no_grad()
    def read(i, removed):
        image = images[i].clone()
        for patch in removed:
            image[:, patch // 6 * 8 : patch // 6 * 8 + 8, patch % 6 * 8 : patch % 6 * 8 + 8] = images[i].mean()
        return model(image[None]).softmax(1)[0, 2].item()

    for c in range(2):
        for i in range(3):
            values = maps[c, i].flatten().tolist()
            order = sorted(range(24), key=lambda p, values=values: (-values[p], p))
            counts = [*range(0, 24, step), 24]
            mif = [read(i, order[:n]) for n in counts]
            lif = [read(i, order[24 - n :]) for n in counts]
            area = [
                sum((b - a) / 24 * (y + z) / 2 for (a, b), (y, z) in zip(pairwise(counts), pairwise(ys), strict=True))
                for ys in (mif, lif)
            ]
            steps = [b - a for a, b in pairwise(lif[::-1])]
            shares = [max(round(k * 24), 1) for k in (0.01, 0.05, 0.1, 0.2, 0.5)]
            expected = {
                "deletion": area[0],
                "insertion": area[1],
                "srg": area[1] - area[0],
                "aopc": sum(mif[0] - y for y in mif) / len(mif),
                "comprehensiveness": sum(mif[0] - read(i, order[:n]) for n in shares) / 5,
                "sufficiency": sum(mif[0] - read(i, order[n:]) for n in shares) / 5,
                "monotonicity": sum(gain >= -1e-6 * max(lif) for gain in steps) / len(steps),
            }
            for name, value in expected.items():
                assert float(found[name][c, i]) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_the_forwards_are_shared(model, images):
    maps = torch.rand(3, 4, 6)
    alone = fastfg.evaluate(model, images, maps, target=2, metrics=["srg"])
    both = fastfg.evaluate(
        model, images, maps, target=2, metrics=[*CURVES, "pixel_flipping"], comprehensiveness={"k": [0.1, 0.5]}
    )
    assert alone.forwards["run"] == both.forwards["run"] == 3 * (1 + 23 + 23 + 1)


def test_a_random_map_has_no_srg(model, images):
    maps = torch.rand(60, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = fastfg.evaluate(model, images, maps, target=2, metrics=["srg"], srg={"patches_per_step": 4})["srg"]
    per_map = found.mean(1)
    assert abs(float(per_map.mean())) < 2 * float(per_map.std()) / math.sqrt(len(per_map))
    assert float(per_map.std()) > 0


# Edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [2, 3, 4])
def test_few_patches(P):
    found = scores([3.0, 2, 1, 4][:P], [3.0, 2, 1, 4][:P], metrics=[*CURVES, "infidelity"])
    assert found.errors == []
    assert all(found[name].isfinite().all() for name in found)


def test_curves_that_say_nothing(model, images):
    """A constant map, a blank image, a map with NaN, and a model that ignores the image have names."""
    maps = torch.rand(3, 4, 6)
    maps[0], maps[1, 0, 0] = 1.0, torch.nan
    images = images.clone()
    images[2] = 0.3
    found = fastfg.evaluate(model, images, maps, target=2, metrics=[*CURVES, "infidelity", "sensitivity_n"])
    assert all(found[name].isnan().all() for name in found)
    reasons = {(e.metric, e.image): e.message for e in found.errors}
    for metric in found:
        assert reasons[metric, 0] == "the attribution is the same for every patch"
        assert reasons[metric, 1] == "the attribution is not finite"
        assert reasons[metric, 2] == "the image is blank: all its pixels are the same"

    def deaf(images):
        return torch.tensor([[0.1, 0.9]], dtype=torch.float64).repeat(len(images), 1)

    found = fastfg.evaluate(deaf, torch.rand(1, 3, 8, 8).double(), torch.rand(1, 2, 2), target=1, metrics=list(found))
    assert {e.message for e in found.errors} == {"removing patches does not change the reading"}
    assert len(found.errors) == len(found)


def test_normalised_scores():
    found = scores([4, 3, 2, 1], [4.0, 3, 2, 1], metrics=["deletion"], deletion={"normalised": True})
    assert float(found["deletion"]) == pytest.approx(0.375)
    balanced = scores([1, -1], [2.0, 1], metrics=["deletion", "insertion"], deletion={"normalised": True})
    (error,) = balanced.errors  # 0 1 .. 0: with all patches as without any
    assert error.message.startswith("the reading without any patch is missing or not below that of the image")
    assert balanced["deletion"].isnan().all()
    rising = scores([-4, -3, 2, 1], [4.0, 3, 2, 1], metrics=["deletion"], deletion={"normalised": True})
    assert rising["deletion"].isnan().all()
    assert balanced["insertion"].isfinite().all()
    assert balanced.details["insertion"]["normalised"].isnan().all()


def test_a_curve_that_ends_one_step_early():
    """Without a reading of the image without patches: 10 6 3 1 and 10 9 7 4 over x = 0 to 0.75, nothing normalised."""
    maps = torch.tensor([[4.0, 3, 2, 1]]).double()
    readings = {"deletion": [10, 6, 3, 1], "insertion": [10, 9, 7, 4], "srg": [10, 6, 3, 1, 9, 7, 4]}
    expected = {"deletion": 14.5 / 3, "insertion": 23 / 3, "srg": 8.5 / 3}
    for name, values in readings.items():
        metric = METRICS[name]()
        plan = metric.plan(maps, None, None)
        assert plan.order is not None
        assert plan.masks[0].all(1).tolist() == [False] * (len(values) - 1) + [True]
        plan = dataclasses.replace(plan, masks=plan.masks[:, :-1])
        reading = torch.tensor([values]).double()
        score, details = metric.score(maps, plan, Readings(reading, reading, reading))
        assert float(score) == pytest.approx(expected[name])
        assert details["x"].tolist() == [[0, 0.25, 0.5, 0.75]]
        assert details.get("normalised", torch.tensor(torch.nan)).isnan().all()


def test_top_patches_that_do_nothing_are_the_worst_and_no_error():
    found = scores([4, 3, 0, 0], [1.0, 2, 4, 3], metrics=["comprehensiveness", "deletion"])
    assert found.errors == []
    assert float(found["comprehensiveness"]) == 0


def test_aopc_is_a_linear_function_of_deletion():
    for weights in ([4, 3, 2, 1], [1, 5, -2, 3]):
        found = scores(weights, [4.0, 3, 2, 1], metrics=["aopc", "deletion"])
        whole, L = sum(weights), 4
        expected = whole - (L * float(found["deletion"]) + whole / 2) / (L + 1)
        assert float(found["aopc"]) == pytest.approx(expected)


def test_arithmetic_alone():
    x = torch.tensor([0.0, 0.75, 1.0])
    assert float(mean_height(x, torch.tensor([1.0, 0, 0]))) == 0.375
    assert float(mean_height(x / 2, torch.tensor([1.0, 0, 0]))) == 0.375
    assert normalised(torch.tensor([3.0, 2, 1])).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "deletion",
            {"patches_per_step": 0},
            ValueError,
            "deletion: expected patches_per_step >= 1, an integer",
        ),
        ("aopc", {"patches_per_step": 24}, ValueError, "aopc: expected patches_per_step from 1 to 23"),
        (
            "pixel_flipping",
            {"patches_per_step": 24},
            ValueError,
            "pixel_flipping: expected patches_per_step from 1 to 23",
        ),
        ("srg", {"patches_per_step": 30}, ValueError, "srg: expected patches_per_step from 1 to 23, .* got 30"),
        ("insertion", {"normalised": 1}, TypeError, "insertion: expected normalised to be True or False, got 1"),
        ("sufficiency", {"k": 1.5}, ValueError, "sufficiency: expected k between 0 and 1, one or several, got 1.5"),
        ("sufficiency", {"k": None}, ValueError, "sufficiency: expected k between 0 and 1, one or several, got None"),
        ("comprehensiveness", {"k": []}, ValueError, "comprehensiveness: expected k between 0 and 1"),
        ("srg", {"baseline": "running_mean"}, ValueError, "srg: expected a baseline that does not depend on the order"),
        ("sensitivity_n", {"n": 0}, ValueError, "sensitivity_n: expected n >= 1, an integer, got 0"),
        ("sensitivity_n", {"n": 25}, ValueError, "sensitivity_n: expected n from 1 to 24 patches, got 25"),
        ("sensitivity_n", {"subset_size": 3}, ValueError, "sensitivity_n: expected n in place of subset_size"),
        ("infidelity", {"n_runs": 1}, ValueError, "infidelity: expected n_runs >= 2, an integer, got 1"),
    ],
)
def test_wrong_options(model, images, name, options, error, message):
    with pytest.raises(error, match=message):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=2, metrics=[name], **{name: options})


def test_an_unknown_option(model, images):
    with pytest.raises(TypeError, match="deltion: expected the name of a metric"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=2, deltion={"patches_per_step": 4})


def test_every_metric_says_what_it_is():
    for name, metric in METRICS.items():
        for fact in ("title", "short", "value_range", "cost", "source", "failings"):
            assert getattr(metric, fact), f"{name}.{fact}"
        assert metric.higher_is_better in (True, False)
