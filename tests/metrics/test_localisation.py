"""The localisation metrics by hand, against a loop over pixels and patches, and against Quantus and scikit-learn."""

import numpy as np
import pytest
import torch

import fastfg
from fastfg.metrics import METRICS, Localisation, area_under_roc, mass_accuracy

NAMES = ("pointing_game", "relevance_mass", "relevance_rank", "top_k_intersection", "roc_auc", "iou")
IMAGES = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def model(images):
    return torch.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3))], 1)


def mask_of(patches, grid=(2, 3), patch=2):
    """A mask [1, H, W] of whole patches."""
    inside = torch.zeros(grid[0] * grid[1]).index_fill_(0, torch.tensor(patches, dtype=torch.long), 1)
    return inside.reshape(1, *grid).repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def judged(values, masks, metrics=NAMES, images=IMAGES, **options):
    maps = torch.tensor(values).reshape(1, 2, 3) if isinstance(values, list) else values
    return fastfg.evaluate(model, images, maps, target=0, metrics=metrics, masks=masks, **options)


def numbers(scores):
    return {name: float(scores[name]) for name in scores}


def test_by_hand():
    """Patches 1 and 2 are the object; the map's order is 2, 3, 1, 0, 4, 5."""
    scores = judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], mask_of([1, 2]), top_k_intersection={"k": 3})
    assert numbers(scores) == pytest.approx(
        {
            "pointing_game": 1,
            "relevance_mass": 8 / 13,
            "relevance_rank": 1 / 2,  # of 2 and 3
            "top_k_intersection": 2 / 3,  # of 2, 3 and 1
            "roc_auc": 7 / 8,  # 8 pairs, of which 3 > 1 is wrong
            "iou": 1 / 3,  # above the mean of 2: patches 2 and 3
        }
    )
    assert scores.errors == []
    assert scores.details["pointing_game"]["patch"].tolist() == [2]
    assert scores.details["relevance_rank"]["n_inside"].tolist() == [2]
    assert scores.details["iou"]["n_above"].tolist() == [2]


def test_the_best_and_the_worst_map():
    best = numbers(judged([0.0, 3.0, 3.0, 0.0, 0.0, 0.0], mask_of([1, 2])))
    assert best == dict.fromkeys(NAMES, 1.0)
    worst = numbers(judged([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], mask_of([1, 2])))
    assert worst == dict.fromkeys(NAMES, 0.0)


def test_ties_go_to_the_lowest_index_and_count_half_for_the_auc():
    first, last = (judged([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], mask_of([patch])) for patch in (0, 5))
    assert [float(first[name]) for name in ("pointing_game", "relevance_rank", "top_k_intersection")] == [1, 1, 1]
    assert [float(last[name]) for name in ("pointing_game", "relevance_rank", "top_k_intersection")] == [0, 0, 0]
    assert float(first["roc_auc"]) == float(last["roc_auc"]) == (3 + 2 / 2) / 5


def test_negative_attributions():
    """They are no mass, and are ranked last elsewhere: adding a constant changes the mass alone."""
    values = [1.0, -2.0, 6.0, 4.0, 0.0, -1.0]
    scores = judged(values, mask_of([1, 2]))
    assert float(scores["relevance_mass"]) == pytest.approx(6 / 11)
    shifted = judged([value - 3 for value in values], mask_of([1, 2]))
    assert float(shifted["relevance_mass"]) == pytest.approx(3 / 4)
    for name in NAMES:
        assert name == "relevance_mass" or float(shifted[name]) == float(scores[name])


def test_shares_by_area():
    """A mask of three columns takes half of each middle patch."""
    masks = torch.zeros(1, 4, 6)
    masks[:, :, :3] = 1
    values = [1.0, 6.0, 5.0, 2.0, 4.0, 2.0]
    assert float(judged(values, masks)["relevance_mass"]) == pytest.approx((1 + 2 + 6 / 2 + 4 / 2) / 20)
    half = judged(values, masks, relevance_mass={"min_share": 0.5}, iou={"min_share": 0.75})
    assert float(half["relevance_mass"]) == pytest.approx((1 + 2 + 6 + 4) / 20)
    assert float(half["pointing_game"]) == 1  # exactly half is inside
    assert float(half["iou"]) == 0  # above the mean: patches 1, 2, 4; inside: 0 and 3
    whole = judged(values, masks, ("pointing_game",), pointing_game={"min_share": 1})
    assert float(whole["pointing_game"]) == 0
    soft = judged(values, masks * 0.5 + 0.1, ("relevance_mass",))
    assert float(soft["relevance_mass"]) == pytest.approx(0.1 + 0.5 * 8 / 20)


def by_loop(values, mask, grid, min_share=0.5):
    """All metrics of one map, patch by patch and pair by pair."""
    values, (gh, gw) = values.flatten().tolist(), grid
    ph, pw = mask.shape[0] // gh, mask.shape[1] // gw
    share = []
    for patch in range(gh * gw):
        row, column = divmod(patch, gw)
        pixels = mask[row * ph : row * ph + ph, column * pw : column * pw + pw]
        share.append(sum(float(pixel) for pixel in pixels.flatten()) / (ph * pw))
    inside = [one >= min_share for one in share]
    order = sorted(range(gh * gw), key=lambda patch: (-values[patch], patch))
    n = sum(inside)
    k = -(-gh * gw // 50)
    pairs = [
        1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0
        for i in range(gh * gw)
        for j in range(gh * gw)
        if inside[i] and not inside[j]
    ]
    above = [value > sum(values) / len(values) for value in values]
    positive = [max(value, 0) for value in values]
    return {
        "pointing_game": float(inside[order[0]]),
        "relevance_mass": sum(p * s for p, s in zip(positive, share, strict=True)) / sum(positive),
        "relevance_rank": sum(inside[patch] for patch in order[:n]) / n,
        "top_k_intersection": sum(inside[patch] for patch in order[:k]) / k,
        "roc_auc": sum(pairs) / len(pairs),
        "iou": sum(a and b for a, b in zip(above, inside, strict=True))
        / sum(a or b for a, b in zip(above, inside, strict=True)),
    }


@pytest.fixture(scope="module")
def cases():
    """Images, several maps per image with ties and negative values, and masks with soft borders."""
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, 32, 48, generator=draw, dtype=torch.float64)
    maps = torch.randn(2, 4, 8, 12, generator=draw).mul(4).round().div(4)
    low = torch.rand(4, 1, 4, 5, generator=draw)
    masks = torch.nn.functional.interpolate(low, size=(32, 48), mode="bilinear")[:, 0]
    return images, maps, masks


def test_equals_the_loop(cases):
    images, maps, masks = cases
    scores = fastfg.evaluate(model, images, maps, target=0, metrics=NAMES, masks=masks)
    for c in range(2):
        for i in range(4):
            expected = by_loop(maps[c, i], masks[i], (8, 12))
            assert {name: float(scores[name][c, i]) for name in NAMES} == pytest.approx(expected, abs=1e-6)
    alone = fastfg.evaluate(model, images[2:3], maps[:, 2:3], target=0, metrics=NAMES, masks=masks[2:3])
    for name in NAMES:
        assert torch.equal(alone[name][:, 0], scores[name][:, 2])


def test_bool_and_float_masks_agree(cases):
    images, maps, masks = cases
    hard = masks > 0.5
    options = {"target": 0, "metrics": NAMES}
    found = fastfg.evaluate(model, images, maps, masks=hard, **options)
    for other in (hard.float(), hard.double(), hard.half()):
        same = fastfg.evaluate(model, images, maps, masks=other, **options)
        assert all(torch.equal(found[name], same[name]) for name in NAMES)


def test_against_quantus(cases):
    """On maps without ties: Quantus counts any tied maximum as a hit, and its order of ties is NumPy's."""
    quantus = pytest.importorskip("quantus")
    maps = torch.randn(6, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = torch.stack([mask_of(list(range(n, 3 * n)), (8, 12))[0] for n in range(3, 9)])
    images = torch.rand(6, 3, 16, 24, dtype=torch.float64)
    options = {"top_k_intersection": {"k": 7}}
    names = [name for name in NAMES if name != "iou"]
    found = fastfg.evaluate(model, images, maps, target=0, metrics=names, masks=masks, **options)
    positive = fastfg.evaluate(model, images, maps.abs(), target=0, metrics=["relevance_mass"], masks=masks)
    plain = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}
    judges = {
        "pointing_game": quantus.PointingGame(**plain),
        "relevance_rank": quantus.RelevanceRankAccuracy(**plain),
        "top_k_intersection": quantus.TopKIntersection(k=7, **plain),
        "roc_auc": quantus.AUC(**plain),
        "relevance_mass": quantus.RelevanceMassAccuracy(**plain | {"abs": True}),
    }
    patches = np.zeros((6, 1, 8, 12))
    inside = masks[:, ::2, ::2].unsqueeze(1).numpy()
    for name, metric in judges.items():
        expected = metric(None, patches, np.zeros(6, int), a_batch=maps.unsqueeze(1).numpy(), s_batch=inside)
        scores = positive if name == "relevance_mass" else found
        assert scores[name].tolist() == pytest.approx([float(one) for one in expected], abs=1e-6), name


def test_mass_by_share_is_the_metric_on_pixels(cases):
    """Quantus on the map spread over its pixels, with a mask that cuts through patches."""
    quantus = pytest.importorskip("quantus")
    images, maps, masks = cases
    hard, maps = masks > 0.5, maps[0].abs().double()
    spread = maps.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).numpy()
    metric = quantus.RelevanceMassAccuracy(abs=False, normalise=False, disable_warnings=True)
    expected = metric(None, images.numpy(), np.zeros(4, int), a_batch=spread, s_batch=hard.unsqueeze(1).float().numpy())
    found = fastfg.evaluate(model, images, maps, target=0, metrics=["relevance_mass"], masks=hard)
    assert found["relevance_mass"].tolist() == pytest.approx([float(one) for one in expected], abs=1e-6)


def test_auc_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(2)
    maps = torch.randn(3, 4, 96, generator=draw).mul(3).round()
    inside = torch.rand(96, generator=draw) < 0.3
    found = area_under_roc(maps, inside)
    for c in range(3):
        for i in range(4):
            assert float(found[c, i]) == pytest.approx(metrics.roc_auc_score(inside, maps[c, i]), abs=1e-12)


def test_functions_on_arrays():
    share = torch.tensor([0.5, 1.0, 1.0])
    assert mass_accuracy(torch.tensor([[3.0, 1.0, -5.0], [0.0, 0.0, 1.0]]), share).tolist() == [0.625, 1.0]
    assert mass_accuracy(torch.tensor([0.0, -1.0, -5.0]), share).isnan()
    assert area_under_roc(torch.arange(3.0), torch.ones(3).bool()).isnan()


def reasons(scores):
    return {error.metric: error.message for error in scores.errors}


def test_masks_that_say_nothing_have_names():
    values = [1.0, 2.0, 6.0, 4.0, 0.0, -1.0]
    empty = judged(values, torch.zeros(1, 4, 6))
    assert reasons(empty) == dict.fromkeys(NAMES, "the mask is empty: no patch overlaps with it")
    assert all(empty[name].isnan().all() for name in NAMES)
    full = judged(values, torch.ones(1, 4, 6, dtype=torch.bool))
    assert reasons(full) == dict.fromkeys(NAMES, "the mask covers every patch")
    even = judged(values, torch.full((1, 4, 6), 0.75), ("relevance_mass",))
    assert reasons(even) == {"relevance_mass": "the mask takes the same share of every patch"}


def test_a_mask_that_no_patch_is_inside_of():
    masks = torch.zeros(1, 4, 6)
    masks[0, 1, 1] = 1  # a quarter of patch 0
    scores = judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], masks)
    message = "no patch has 0.5 of its area inside the mask, the most is 0.25"
    assert reasons(scores) == {name: message for name in NAMES if name != "relevance_mass"}
    assert float(scores["relevance_mass"]) == pytest.approx(0.25 / 13)
    lower = judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], masks, ("roc_auc",), roc_auc={"min_share": 0.25})
    assert float(lower["roc_auc"]) == 2 / 5


def test_maps_that_say_nothing_have_names():
    for values, message in (
        ([2.0] * 6, "the attribution is the same for every patch"),
        ([1.0, torch.nan, 6.0, 4.0, 0.0, -1.0], "the attribution is not finite"),
    ):
        scores = judged(values, mask_of([1, 2]))
        assert reasons(scores) == dict.fromkeys(NAMES, message)
        assert all(scores[name].isnan().all() for name in NAMES)
    negative = judged([-1.0, -2.0, -6.0, -4.0, 0.0, -1.0], mask_of([1, 2]))
    assert reasons(negative) == {"relevance_mass": "no patch has a positive attribution"}
    blank = judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], mask_of([1, 2]), images=torch.ones(1, 3, 4, 6))
    assert reasons(blank) == dict.fromkeys(NAMES, "the image is blank: all its pixels are the same")


def test_two_patches_are_enough():
    scores = fastfg.evaluate(
        model, torch.rand(1, 3, 2, 4), torch.tensor([[[1.0, 3.0]]]), target=0, metrics=NAMES, masks=mask_of([1], (1, 2))
    )
    assert {name: float(scores[name]) for name in NAMES} == dict.fromkeys(NAMES, 1.0) | {"relevance_mass": 0.75}


def test_the_model_does_not_matter():
    """No perturbed forward, no comparison of tokens with pixels, and no reading that must be finite or must change."""
    seen = []

    def broken(images):
        seen.append(len(images))
        return torch.full((len(images), 2), torch.nan)

    maps = torch.tensor([1.0, 2.0, 6.0, 4.0, 0.0, -1.0]).reshape(1, 2, 3)
    scores = fastfg.evaluate(broken, IMAGES, maps, target=0, metrics=NAMES, masks=mask_of([1, 2]))
    assert scores.errors == []
    assert torch.equal(scores["roc_auc"], judged(maps, mask_of([1, 2]))["roc_auc"])
    assert scores.forwards == {"asked": 1, "run": 1, "saved": 0}
    assert seen == [1, 2]  # the second is the check that the model repeats itself beside another image


def test_a_known_family_runs_the_images_once_and_checks_that(request):
    vit, images = request.getfixturevalue("model"), request.getfixturevalue("images")
    sizes = []
    vit.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    vit.patch_embed.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    masks = torch.zeros(3, 32, 48)
    masks[:, :16, :24] = 1
    scores = fastfg.evaluate(vit, images, torch.rand(3, 4, 6), target=1, metrics=NAMES, masks=masks)
    assert scores.errors == []
    assert scores.path == "pixels"
    assert sizes == [3, 3] * 2
    assert scores.forwards == {"asked": 3, "run": 3, "saved": 0}


def test_beside_other_metrics(request):
    """The other metrics' scores and forwards do not change."""
    vit, images = request.getfixturevalue("model"), request.getfixturevalue("images")
    maps, masks = torch.rand(3, 4, 6), torch.zeros(3, 32, 48)
    masks[:, :16, :24] = 1
    alone = fastfg.evaluate(vit, images, maps, target=1, metrics=["saco"])
    both = fastfg.evaluate(vit, images, maps, target=1, metrics=["saco", "iou"], masks=masks)
    assert torch.equal(alone["saco"], both["saco"])
    assert alone.forwards == both.forwards
    assert both.path == "tokens"


def test_compare_takes_masks_over_all_batches(request):
    vit, images = request.getfixturevalue("model"), request.getfixturevalue("images")
    masks = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) > 0.3
    masks[:, :8] = True
    masks[:, 24:] = False
    gates = {"vanilla": None, "gated": fastfg.Gate((1,), score="gradient_x_residual")}
    options = {"gates": gates, "metrics": ["roc_auc", "relevance_mass"], "target": 1}
    whole = fastfg.compare(vit, images, masks=masks, **options)
    parts = fastfg.compare(vit, [images[:2], images[2:]], masks=masks, **options)
    np.testing.assert_allclose(parts["roc_auc"], whole["roc_auc"])
    maps = fastfg.attribute(vit, images, target=1).maps
    expected = fastfg.evaluate(vit, images, maps, target=1, metrics=["roc_auc"], masks=masks)
    vanilla = whole[whole["variant"] == "vanilla"]
    np.testing.assert_allclose(vanilla["roc_auc"], expected["roc_auc"])
    with pytest.raises(ValueError, match="expected masks for 3 images in dimension 0, got \\[4, 32, 48\\]"):
        fastfg.compare(vit, images, masks=torch.cat([masks, masks[:1]]), **options)
    with pytest.raises(ValueError, match="expected masks for 3 images or more in dimension 0, got \\[2, 32, 48\\]"):
        fastfg.compare(vit, images, masks=masks[:2], **options)


@pytest.mark.parametrize(
    ("masks", "metrics", "message"),
    [
        (None, ["roc_auc"], r"masks: expected \[1, H, W\], one per image, for roc_auc, got none"),
        (mask_of([1]), ["saco"], r"masks: expected none, as no metric among \('saco',\) takes them, got \[1, 4, 6\]"),
        (mask_of([1])[0], ["iou"], r"masks: expected a tensor \[B, H, W\], got \[4, 6\]"),
        ([[1]], ["iou"], r"masks: expected a tensor \[B, H, W\], got list"),
        (mask_of([1]).long(), ["iou"], r"masks: expected bool, or floating in \[0, 1\], got torch.int64"),
        (mask_of([1]) * 255, ["iou"], r"masks: expected values in \[0, 1\], got 0 to 255"),
        (mask_of([1]) * torch.nan, ["iou"], r"masks: expected values in \[0, 1\], got nan to nan"),
        (mask_of([1]).expand(2, -1, -1), ["iou"], r"iou: expected masks for 1 images in dimension 0, got \[2, 4, 6\]"),
        (torch.ones(1, 2, 3), ["iou"], r"masks: expected \[B, 4, 6\], the size of the images, got \[1, 2, 3\]"),
    ],
)
def test_errors_name_masks(masks, metrics, message):
    with pytest.raises(ValueError, match=message):
        judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], masks, metrics)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iou", {"threshold": 1.0}, "iou: expected threshold 'mean' or from 0 to below 1, got 1.0"),
        ("iou", {"threshold": "median"}, "iou: expected threshold 'mean' or from 0 to below 1, got 'median'"),
        ("iou", {"threshold": True}, "iou: expected threshold 'mean' or from 0 to below 1, got True"),
        ("roc_auc", {"min_share": 0}, "roc_auc: expected min_share > 0 and at most 1, got 0"),
        ("roc_auc", {"min_share": None}, "roc_auc: expected min_share > 0 and at most 1, got None"),
        ("relevance_mass", {"min_share": 2}, "relevance_mass: expected min_share > 0 and at most 1, got 2"),
        ("top_k_intersection", {"k": 0}, "top_k_intersection: expected k >= 1, an integer, got 0"),
        ("top_k_intersection", {"k": 7}, "top_k_intersection: expected k from 1 to 6 patches, got 7"),
    ],
)
def test_errors_name_the_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], mask_of([1]), [name], **{name: options})


def test_iou_with_a_threshold_on_the_range():
    values = [0.0, 2.0, 10.0, 4.0, 1.0, 3.0]
    for threshold, expected in ((0.0, 2 / 5), (0.2, 1 / 4), (0.35, 1 / 3), (0.5, 1 / 2)):
        scores = judged(values, mask_of([1, 2]), ["iou"], iou={"threshold": threshold})
        assert float(scores["iou"]) == pytest.approx(expected), threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 10.0, 3e-5])
def test_a_patch_at_the_mean_is_not_above_it(scale, dtype):
    maps = (torch.tensor([[0.2, 0.3, 0.2, 0.1]], dtype=dtype) * scale).double()
    _, details = METRICS["iou"]().compare(maps, torch.tensor([[True, False, True, False]]))
    assert details["n_above"].tolist() == [1]


def test_masks_may_be_given_to_a_metric_itself():
    one = METRICS["iou"](masks=mask_of([1, 2]))
    scores = judged([1.0, 2.0, 6.0, 4.0, 0.0, -1.0], mask_of([0]), [one, "pointing_game"])
    assert float(scores["iou"]) == pytest.approx(1 / 3)
    assert float(scores["pointing_game"]) == 0
    assert {name for name, metric in METRICS.items() if issubclass(metric, Localisation)} == set(NAMES)
