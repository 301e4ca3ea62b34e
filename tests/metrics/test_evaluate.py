"""The batched engine against a loop over single images, toys with a known answer, and one bad image."""

import numpy as np
import pytest
import torch
from scipy import stats

import fastfg
from tests.metrics.test_saco import by_the_definition
from tests.tools import tiny_vit


def patches(image, chosen, fill, grid=(4, 6), size=8):
    """``image`` with the chosen patches filled, by slicing."""
    image = image.clone()
    for patch in chosen:
        row, column = divmod(int(patch), grid[1])
        image[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = fill
    return image


@torch.no_grad()
def one_at_a_time(model, image, amap, target, subsets, n_bins, step, impact="target", running=False, kind="spearman"):
    """All three metrics, one forward at a time."""

    def read(x):
        logits = model(x[None])[0].double()
        return float(logits[target]), float(logits.softmax(0)[target]), float(logits.softmax(0).max())

    fill = image.mean()
    attribution = amap.flatten().double().numpy()
    order = np.argsort(-attribution, kind="stable")
    logit, prob, _ = read(image)

    a, d = [], []
    for group in np.array_split(order, n_bins):
        a.append(attribution[group].sum())
        d.append(prob - read(patches(image, group, fill))[1 if impact == "target" else 2])
    saco = by_the_definition(a, d)

    trials = []
    correlate = stats.spearmanr if kind == "spearman" else stats.pearsonr
    for trial in subsets:
        drops = [logit - read(patches(image, subset, fill))[0] for subset in trial]
        trials.append(correlate([attribution[s].sum() for s in trial], drops).statistic)

    curve, now = [prob], image
    for start in range(0, len(order), step):
        now = patches(now, order[start : start + step], now.mean() if running else fill)
        curve.append(read(now)[1])
    return saco, float(np.mean(trials)), float(np.trapezoid(curve))


@pytest.mark.parametrize(
    "options", [{}, {"impact": "max", "running": True, "kind": "pearson"}], ids=["default", "author"]
)
@pytest.mark.parametrize("step", [1, 5])
def test_equals_the_loop(model, images, options, step):
    maps = fastfg.attribute(model, images).maps
    target = torch.tensor([1, 0, 4])
    scores = fastfg.evaluate(
        model,
        images,
        maps,
        target=target,
        batch_size=7,
        saco={"n_bins": 7, "impact": options.get("impact", "target")},
        faithfulness_correlation={"n_runs": 6, "n_trials": 2, "correlation": options.get("kind", "spearman")},
        pixel_flipping={"patches_per_step": step, "baseline": "running_mean" if options else "mean"},
    )
    for i in range(3):
        subsets = scores.details["faithfulness_correlation"]["subsets"][i].numpy()
        expected = one_at_a_time(model, images[i], maps[i], int(target[i]), subsets, 7, step, **options)
        assert [float(scores[m][i]) for m in scores] == pytest.approx(expected, rel=1e-9)
        assert list(scores) == ["saco", "faithfulness_correlation", "pixel_flipping"]
    assert scores.errors == []


def linear_toy(weights):
    """A model whose first logit is a weighted sum of the 2 x 2 patches' means, exactly."""

    def model(images):
        means = images.double().unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((1, 3, 5)).flatten(1)
        logit = (means * weights).sum(1)
        return torch.stack([logit, torch.zeros_like(logit)], 1)

    return model


STRIPES = torch.tensor([0.5, 1.5]).repeat(1, 1, 4, 2)  # the mean of each 2 x 2 patch is 1


def test_toy_with_a_known_answer():
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0]).double()
    model, image = linear_toy(weights), STRIPES
    best, worst = weights.reshape(1, 2, 2), -weights.reshape(1, 2, 2)
    options = {"target": 0, "baseline": "zero", "saco": {"n_bins": 4}}
    scores = fastfg.evaluate(model, image, torch.stack([best, worst]), **options)
    assert scores["saco"].flatten().tolist() == [1.0, -1.0]
    assert scores["faithfulness_correlation"].flatten().tolist() == pytest.approx([1.0, -1.0])

    def curve(logits):
        return [1 / (1 + np.exp(-logit)) for logit in logits]

    np.testing.assert_allclose(scores.details["pixel_flipping"]["curve"][0, 0], curve([15, 7, 3, 1, 0]), rtol=1e-12)
    np.testing.assert_allclose(scores.details["pixel_flipping"]["curve"][1, 0], curve([15, 14, 12, 8, 0]), rtol=1e-12)
    assert float(scores["pixel_flipping"][0]) == pytest.approx(np.trapezoid(curve([15, 7, 3, 1, 0])), rel=1e-12)
    impact = scores.details["saco"]["impact"][0, 0]
    np.testing.assert_allclose(impact, curve([15])[0] - np.array(curve([7, 11, 13, 14])), rtol=1e-9)


def test_ties_are_broken_by_patch_index():
    model = linear_toy(torch.tensor([1.0, 2.0, 4.0, 8.0]).double())
    maps = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    scores = fastfg.evaluate(model, STRIPES, maps, target=0, baseline="zero", saco={"n_bins": 2})
    assert scores.details["saco"]["group_attribution"].tolist() == [[1.0, 0.0]]
    steps = [1 / (1 + np.exp(-logit)) for logit in (15, 7, 6, 4, 0)]
    np.testing.assert_allclose(scores.details["pixel_flipping"]["curve"][0], steps, rtol=1e-12)
    impact = [steps[0] - 1 / (1 + np.exp(-logit)) for logit in (6, 9)]  # without patches 3 and 0, without 1 and 2
    np.testing.assert_allclose(scores.details["saco"]["impact"][0], impact, rtol=1e-9)


@pytest.mark.parametrize("baseline", [*fastfg.perturb.FILLS, 0.3])
def test_an_image_scores_the_same_in_any_batch(baseline):
    model = tiny_vit()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    images = torch.randn(4, 3, 32, 48, dtype=torch.float64)
    maps = torch.rand(2, 4, 4, 6)
    options = {
        "baseline": baseline,
        "faithfulness_correlation": {"n_runs": 5},
        "pixel_flipping": {"patches_per_step": 6},
    }
    together = fastfg.evaluate(model, images, maps, target=1, batch_size=11, **options)
    for order in ([2], [3, 1]):
        alone = fastfg.evaluate(model, images[order], maps[:, order], target=1, batch_size=4, **options)
        for metric in together:
            torch.testing.assert_close(alone[metric], together[metric][:, order], rtol=1e-9, atol=1e-12)
        assert alone.image_keys == [together.image_keys[i] for i in order]


def test_keys_and_seeds_decide_what_is_random(model, images):
    maps = torch.rand(3, 4, 6)

    def subsets(**options):
        options = {"metrics": ["faithfulness_correlation"], "target": 0} | options
        return fastfg.evaluate(model, images, maps, **options).details["faithfulness_correlation"]["subsets"]

    assert torch.equal(subsets(keys=["a", "b", "c"]), subsets(keys=["a", "b", "c"], batch_size=3))
    assert not torch.equal(subsets(keys=["a", "b", "c"])[0], subsets(keys=["x", "b", "c"])[0])
    assert torch.equal(subsets(keys=["a", "b", "c"])[1:], subsets(keys=["x", "b", "c"])[1:])
    assert not torch.equal(subsets(seed=0), subsets(seed=1))
    given = torch.rand(2, 4, 3, 24).argsort(-1)[..., :5]
    used = subsets(faithfulness_correlation={"subsets": given})
    assert torch.equal(used, given.permute(2, 0, 1, 3))


def test_several_maps_equal_each_alone_and_share_forwards(model, images):
    maps = torch.rand(3, 3, 4, 6)
    together = fastfg.evaluate(model, images, maps, target=1)
    asked = run = 0
    for c in range(3):
        alone = fastfg.evaluate(model, images, maps[c], target=1)
        for metric in together:
            torch.testing.assert_close(together[metric][c], alone[metric], rtol=1e-9, atol=1e-12)
            assert together[metric].dtype == torch.float64
        asked, run = asked + alone.forwards["asked"], run + alone.forwards["run"]
    assert together.forwards["asked"] == asked
    shared = 60 + 1 + 1  # the subsets, the plain image, and the image without any patch
    assert run - together.forwards["run"] >= 2 * 3 * shared
    assert together.forwards["saved"] == together.forwards["asked"] - together.forwards["run"]


def test_defaults_are_those_of_the_paper(model, images):
    maps = torch.rand(3, 4, 6)
    scores = fastfg.evaluate(model, images, maps, target=1)
    assert scores.details["saco"]["impact"].shape == (3, 6)
    assert scores.details["faithfulness_correlation"]["subsets"].shape == (3, 3, 20, 5)
    assert scores.details["pixel_flipping"]["curve"].shape == (3, 25)
    assert scores.forwards["asked"] == 3 * (6 + 1 + 3 * 21 + 25)


def test_one_bad_map_is_an_error_for_that_image_alone(model, images):
    maps = torch.rand(2, 3, 4, 6)
    good = fastfg.evaluate(model, images, maps, target=1)
    maps[1, 2, 0, 0] = torch.nan
    scores = fastfg.evaluate(model, images, maps, target=1, keys=["a", "b", "c"], seed=0)
    for metric in ("saco", "pixel_flipping"):
        torch.testing.assert_close(scores[metric][0], good[metric][0])
        torch.testing.assert_close(scores[metric][1, :2], good[metric][1, :2])
        assert scores[metric][1, 2].isnan()
    assert {(e.metric, e.config, e.image, e.key) for e in scores.errors} == {(m, 1, 2, "c") for m in scores}
    assert all(e.message == "the attribution is not finite" for e in scores.errors)


def test_logits_that_are_not_finite_are_an_error_for_that_image_alone(images):
    def model(x):
        logits = x.mean((2, 3))
        return torch.where((x[:, :1, 0, 0] > 1e3), torch.nan, logits)

    images = images.clone()
    images[1, 0, 0, 0] = 1e4
    maps = torch.rand(3, 4, 6)
    maps[:, 0, 0] = 2.0  # the first patch is removed first: Pixel Flipping sees the NaN only in its unperturbed point
    scores = fastfg.evaluate(model, images, maps, target=1)
    for metric in scores:
        assert scores[metric].isnan().tolist() == [False, True, False]
    assert {e.message for e in scores.errors} == {"the model's logits are not finite"}
    assert {e.image for e in scores.errors} == {1}


def test_model_and_inputs_are_left_as_they_were(model, images):
    model.train()
    maps = torch.rand(3, 4, 6)
    kept = images.clone(), maps.clone()
    fastfg.evaluate(model, images, maps, target=None)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(images, kept[0])
    assert torch.equal(maps, kept[1])


def test_digits_and_progress(digits_model):
    vit, pixels, _ = digits_model
    result = fastfg.attribute(vit, pixels[:3])
    seen = []
    scores = fastfg.evaluate(
        vit, pixels[:3], result.maps, target=result.target, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert {done for done, _ in seen} == {0, 1, 2, 3}
    assert all(values.isfinite().all() for values in scores.values())
    assert scores.summary()["saco"].shape == ()
