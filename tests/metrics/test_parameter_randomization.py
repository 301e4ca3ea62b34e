"""Parameter randomisation: the plain, smooth and efficient forms against loops, Quantus and toys."""

import copy
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import fastfg
from fastfg.metrics import EfficientParameterRandomization, ParameterRandomization, histogram_entropy
from fastfg.models.redraw import copy_model, find_parts, redraw
from fastfg.perturb import generator
from tests.metrics.explain_again import Linear, contributions, patch_means, toy, vanilla
from tests.tools import tiny_vit

BOTH = ["parameter_randomization", "efficient_parameter_randomization"]


def spearman(a, b):
    return stats.spearmanr(a.flatten(), b.flatten()).statistic


def redrawn_models(model, images, order="top_down", seed=0):
    """Copies of ``model``, each with one more part re-drawn than the one before."""
    parts = find_parts(model, images[:1], lambda output: output[:1, 0])
    made, now = [], copy.deepcopy(model)
    for part in parts if order == "top_down" else parts[::-1]:
        redraw(now, part, generator(seed, part.name, "re-drawn").initial_seed())
        made.append(copy.deepcopy(now))
    return made


@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
def test_equals_the_loop(model, images, order):
    target, before = torch.tensor([1, 0, 4]), copy.deepcopy(model.state_dict())
    maps, random = fastfg.attribute(model, images, target=target).maps, torch.random.get_rng_state()
    options = {"target": target, "explain": vanilla, "metrics": BOTH, "seed": 5}
    found = fastfg.evaluate(model, images, maps, keys=[*"abc"], parameter_randomization={"order": order}, **options)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    models = redrawn_models(model, images, order, seed=5)
    assert len(models) == 4 + 2
    for i in range(3):
        made = [fastfg.attribute(m, images[i : i + 1], target=target[[i]]).maps[0] for m in models]
        expected = [spearman(maps[i], one) for one in made]
        assert found.details[BOTH[0]]["correlation"][i].tolist() == pytest.approx(expected, abs=1e-9)
        assert found[BOTH[0]][i].item() == pytest.approx(np.mean(expected), abs=1e-9)
        before, after = (stats.entropy(np.histogram(m.flatten(), bins=100)[0]) for m in (maps[i], made[-1]))
        assert found[BOTH[1]][i].item() == pytest.approx((after - before) / before, abs=1e-9)
    assert found.errors == []
    assert found.forwards["attributions"] == 3 * (1 + 6)  # the efficient form shares its map
    rows = slice(2, 3)
    alone = fastfg.evaluate(
        model,
        images[rows],
        maps[rows],
        keys=["c"],
        parameter_randomization={"order": order},
        **options | {"target": target[rows]},
    )
    for name in BOTH:
        assert alone[name].item() == pytest.approx(found[name][2].item(), abs=1e-9)


def test_the_smooth_form_equals_the_loop(model, images):
    maps = fastfg.attribute(model, images, target=1).maps
    options = {"n_samples": 3, "noise": 0.2, "absolute": True, "correlation": "pearson"}
    found = fastfg.evaluate(
        model,
        images,
        maps,
        target=1,
        keys=[*"abc"],
        explain=vanilla,
        metrics=BOTH[:1],
        parameter_randomization=options,
    )

    def smooth(model, image, key):
        noisy = [image]
        for j in range(2):
            random = generator(0, key, f"parameter_randomization noise {j}")
            noise = torch.randn(image.shape, generator=random, dtype=torch.float64)
            noisy.append(image + 0.2 * (image.max() - image.min()) * noise)
        return torch.stack([fastfg.attribute(model, x[None], target=1).maps[0] for x in noisy]).mean(0).flatten()

    for i, key in enumerate("abc"):
        own = smooth(model, images[i], key)
        expected = [
            stats.pearsonr(own.abs(), smooth(m, images[i], key).abs()).statistic for m in redrawn_models(model, images)
        ]
        assert found.details[BOTH[0]]["correlation"][i].tolist() == pytest.approx(expected, abs=1e-9)
    assert found.forwards["attributions"] == 3 * 3 * (1 + 6)


class Deep(nn.Module):
    """Three layers on the patches' means, and a position of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.position = nn.Parameter(torch.arange(4.0))
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, images):
        return self.b(self.norm(torch.tanh(self.a(patch_means(images) + self.position))))


def gradient_x_patch(model, images, target):
    means = images.detach().clone().requires_grad_()
    value = model(means).gather(1, torch.as_tensor(target).reshape(-1, 1)).sum()
    return patch_means(torch.autograd.grad(value, means)[0] * means).detach().reshape(-1, 2, 2)


def test_equals_quantus(monkeypatch):
    """On the same re-drawn models: Quantus draws every layer with one seed."""
    quantus = pytest.importorskip("quantus")
    from quantus.helpers.model.pytorch_model import PyTorchModel

    model, images = Deep().double().eval(), toy(n=4)[1]
    target = torch.tensor([0, 1, 2, 0])
    maps = gradient_x_patch(model, images, target)
    models = redrawn_models(model, images)
    names = [part.name for part in find_parts(model, images[:1], lambda output: output[:1, 0])]
    assert names == ["b", "norm", "a", "Deep"]
    given = [*zip(names, models, strict=True)]
    monkeypatch.setattr(PyTorchModel, "get_random_layer_generator", lambda self, order, seed: iter(given))
    monkeypatch.setattr(PyTorchModel, "random_layer_generator_length", len(given))

    def large(maps):
        return maps.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None]

    def explain(model, inputs, targets, **kwargs):
        return large(gradient_x_patch(model, torch.as_tensor(inputs), torch.as_tensor(targets))).numpy()

    common = {"x_batch": images.numpy(), "y_batch": target.numpy(), "a_batch": large(maps).numpy(), "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = quantus.MPRT(abs=False, normalise=False, disable_warnings=True)
        steps = plain(model=model, explain_func=explain, softmax=True, **common)
        efficient = quantus.EfficientMPRT(layer_order="top_down", disable_warnings=True)
        rise = efficient(model=model, explain_func=explain, softmax=True, **common)
    found = fastfg.evaluate(model, images, maps, target=target, explain=gradient_x_patch, metrics=BOTH)
    expected = np.array([steps[name] for name in names]).T
    np.testing.assert_allclose(found.details[BOTH[0]]["correlation"], expected, atol=1e-6)
    np.testing.assert_allclose(found[BOTH[0]], expected.mean(1), atol=1e-6)
    np.testing.assert_allclose(found[BOTH[1]], np.array(rise, dtype=float), atol=1e-6)


def test_entropy_by_hand():
    found = histogram_entropy([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, float("nan"), 2.0]], n_bins=2)
    assert found[0].item() == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert found[1] == 0
    assert found[2].isnan()


def test_a_map_that_ignores_the_model_has_a_correlation_of_1():
    model, images, _ = toy()

    def edges(model, images, target):
        return patch_means(images).reshape(-1, 2, 2)

    found = fastfg.evaluate(model, images, edges(model, images, 0), target=0, explain=edges, metrics=BOTH)
    assert found[BOTH[0]].tolist() == pytest.approx([1.0] * 3)
    assert found[BOTH[1]].tolist() == [0.0] * 3


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_maps_of_the_redrawn_model_without_meaning(value):
    model, images, maps = toy()
    model.double()

    def explain(asked, images, target):
        made = contributions(asked, images, target)
        return made if asked is model else torch.full_like(made, value)

    found = fastfg.evaluate(model, images, maps, target=0, explain=explain, metrics=BOTH)
    what = "not finite" if value != value else "the same for every patch"
    assert {e.message for e in found.errors} == {
        f"the attribution is {what} where 1 of 1 parts of the model are re-drawn"
    }
    assert all(found[name].isnan().all() for name in BOTH)


def test_models_that_can_not_be_copied_or_redrawn():
    model, images, maps = toy()
    given = {"target": 0, "explain": lambda m, x, t: maps, "metrics": BOTH[:1]}
    with pytest.raises(TypeError, match="model: expected an nn.Module or a fastfg.models.Adapter, .* got function"):
        fastfg.evaluate(lambda x: model(x), images, maps, **given)
    stuck = Linear([[1.0, 2.0, 3.0, 4.0]] * 2)
    stuck.file = (line for line in "ab")
    with pytest.raises(
        ValueError, match="model: expected one that copy.deepcopy can copy, .* cannot pickle 'generator'"
    ):
        fastfg.evaluate(stuck, images, maps, **given)
    empty = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with pytest.raises(ValueError, match="model: expected parameters that can be re-drawn in Sequential, got none"):
        fastfg.evaluate(empty, images, maps, **given)


def test_an_adapter_that_runs_the_users_model_is_refused(model, images):
    """A copy of such an adapter would explain the model itself, and the correlation would be 1."""
    from fastfg.models import adapt

    maps = fastfg.attribute(model, images, target=1).maps
    options = {"target": 1, "explain": vanilla, "metrics": BOTH[:1]}
    plain = fastfg.evaluate(model, images, maps, **options)
    again = fastfg.evaluate(adapt(model), images, maps, **options)
    torch.testing.assert_close(again[BOTH[0]], plain[BOTH[0]])

    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = model

        def forward(self, x):
            return self.vit(x)

    import dataclasses

    whole = Unknown()
    closed = dataclasses.replace(adapt(model), model=whole, forward=lambda x: whole(x))
    with pytest.raises(ValueError, match="model: expected (another output when all parameters are re-drawn|head)"):
        fastfg.evaluate(closed, images, maps, **options | {"explain": lambda m, x, t: vanilla(model, x, t)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "sideways"}, "expected order in"),
        ({"correlation": "ssim"}, "expected correlation in"),
        ({"absolute": 3}, "expected absolute to be True or False"),
        ({"n_samples": 0}, "expected n_samples >= 1"),
        ({"noise": -1}, "expected noise > 0"),
        ({"baseline": 0.0}, "expected no baseline"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"parameter_randomization: {message}"):
        ParameterRandomization(**options)


def test_bad_bins():
    with pytest.raises(ValueError, match="efficient_parameter_randomization: expected n_bins >= 2, an integer, got 1"):
        EfficientParameterRandomization(n_bins=1)


def test_the_parts_of_a_vit_and_what_is_drawn():
    vit = tiny_vit(depth=2, init_values=0.1)
    image = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    parts = find_parts(vit, image, lambda output: output[:, 0])
    assert [part.name for part in parts] == ["head", "block 1", "block 0", "embedding"]
    assert set(parts[0].parameters) == {"norm", "head"}
    assert parts[-1].parameters == {"": ["cls_token", "pos_embed"], "patch_embed.proj": ["weight", "bias"]}
    named = sum(len(names) for part in parts for names in part.parameters.values())
    assert named == len(list(vit.parameters()))
    other = copy_model(vit)
    redraw(other, parts[-1], seed=1)
    assert torch.equal(other.head.weight, vit.head.weight)
    assert not torch.equal(other.patch_embed.proj.weight, vit.patch_embed.proj.weight)
    assert not torch.equal(other.pos_embed, vit.pos_embed)
    assert torch.equal(other.pos_embed.flatten().sort().values, vit.pos_embed.flatten().sort().values)
    again = copy_model(vit)
    redraw(again, parts[-1], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("metrics", [BOTH[:1], BOTH[1:], BOTH])
def test_a_function_that_explains_another_model_than_it_is_given(model, images, metrics):
    maps = vanilla(model, images, 1)

    def ignores(given, images, target):
        return vanilla(model, images, target)

    def by_hand(given, images, target):
        return contributions(line, images, target)

    refused = pytest.raises(ValueError, match="explain: expected maps of the model that it is given, got the same maps")
    with refused:
        fastfg.evaluate(model, images, maps, target=1, explain=ignores, metrics=metrics)
    with refused:
        fastfg.evaluate(model, images[:1], maps[:1], target=1, explain=ignores, metrics=metrics)
    line, given, found = toy()
    with refused:
        fastfg.evaluate(line, given, found, target=0, explain=by_hand, metrics=metrics)


def test_one_of_several_maps_that_is_of_another_model(model, images):
    maps = torch.stack([vanilla(model, images, 1)] * 2)

    def explain(given, images, target):
        return torch.stack([vanilla(given, images, target), vanilla(model, images, target)])

    with pytest.raises(ValueError, match=r"got the same maps \(map 1\) where all parameters are re-drawn"):
        fastfg.evaluate(model, images, maps, target=1, explain=explain, metrics=BOTH)


def test_a_map_that_depends_on_no_model_is_scored(model, images):
    """The test is there to find such maps: those of an edge detector, for example."""

    def edges(given, images, target):
        return nn.functional.avg_pool2d(images.diff(dim=-1, append=images[..., :1]).abs().mean(1), 8)

    maps = edges(None, images, None)
    found = fastfg.evaluate(model, images, maps, target=1, explain=edges, metrics=BOTH)
    assert found[BOTH[0]].tolist() == pytest.approx([1.0] * 3)
    assert found[BOTH[1]].tolist() == [0.0] * 3


def test_methods_that_depend_on_no_model_are_scored_in_compare(model, images):
    found = fastfg.compare(model, images, target=1, methods=["centre", "random"], metrics=BOTH[:1])
    scores = found.groupby("variant")[BOTH[0]].mean()
    assert scores[["centre", "random"]].tolist() == pytest.approx([1.0, 1.0])
    assert abs(scores["vanilla"]) < 1
