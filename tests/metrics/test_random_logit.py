"""Random Logit: toys, a loop, Quantus, one logit, and targets without another class."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import fastfg
from fastfg.metrics import RandomLogit, Subject
from tests.metrics.explain_again import Linear, contributions, toy, vanilla

ONE = {"metrics": ["random_logit"]}


def spearman(a, b):
    return stats.spearmanr(a.flatten(), b.flatten()).statistic


def test_another_class_is_drawn():
    metric, seen = RandomLogit(n_classes=2), set()
    for seed in range(40):
        changes = metric.changes(Subject(2, 4, ()), torch.Generator().manual_seed(seed))
        assert len({change.target for change in changes}) == 2
        seen |= {change.target for change in changes}
    assert seen == {0, 1, 3}


def test_equals_the_loop(model, images):
    target = torch.tensor([1, 0, 4])
    maps = fastfg.attribute(model, images, target=target).maps
    options = {"target": target, "explain": vanilla, "random_logit": {"n_classes": 3}}
    found = fastfg.evaluate(model, images, maps, keys=[*"abc"], **ONE, **options)
    for i in range(3):
        others = found.details["random_logit"]["classes"][i].tolist()
        assert len({*others, int(target[i])}) == 4
        made = [fastfg.attribute(model, images[i : i + 1], target=c).maps[0] for c in others]
        expected = [spearman(maps[i], one) for one in made]
        assert found.details["random_logit"]["correlation"][i].tolist() == pytest.approx(expected, abs=1e-9)
        assert found["random_logit"][i].item() == pytest.approx(np.mean(expected), abs=1e-9)
    rows = slice(1, 2)
    alone = fastfg.evaluate(model, images[rows], maps[rows], keys=["b"], **ONE, **options | {"target": target[rows]})
    assert alone["random_logit"].item() == pytest.approx(found["random_logit"][1].item(), abs=1e-9)


def test_by_hand():
    """With equal patches the contributions are the weights: reversed, alike, and with one pair exchanged."""
    images = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    images[..., 0, 0] += 1e-9  # not blank
    for other, score in (([4.0, 3.0, 2.0, 1.0], -1.0), ([2.0, 4.0, 6.0, 9.0], 1.0), ([2.0, 1.0, 3.0, 4.0], 0.8)):
        model = Linear([[1.0, 2.0, 3.0, 4.0], other])
        found = fastfg.evaluate(
            model, images, contributions(model, images, [0]), target=0, explain=contributions, **ONE
        )
        assert found["random_logit"].item() == pytest.approx(score, abs=1e-12)
        assert found.details["random_logit"]["classes"].tolist() == [[1]]


def test_equals_quantus():
    quantus = pytest.importorskip("quantus")
    model, images, maps = toy(((1.0, 5.0, 3.0, 4.0), (4.0, 1.0, 2.0, 3.0)))

    def explain(model, inputs, targets, **kwargs):
        return large(contributions(model, torch.as_tensor(inputs), torch.as_tensor(targets))).numpy()

    def large(maps):
        return maps.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = quantus.RandomLogit(
            similarity_func=quantus.functions.similarity_func.correlation_spearman,
            num_classes=2,
            normalise=False,
            disable_warnings=True,
        )
        expected = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=np.zeros(3, dtype=int),
            a_batch=large(maps).numpy(),
            explain_func=explain,
            device="cpu",
        )
    found = fastfg.evaluate(model, images, maps, target=0, explain=contributions, **ONE)
    assert found["random_logit"].tolist() == pytest.approx([float(e) for e in expected], rel=1e-6)


def test_one_logit_is_explained_negated():
    from tests.tools import tiny_vit

    vit = tiny_vit(num_classes=1, depth=2)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    maps = [fastfg.attribute(vit, images, target=c).maps for c in (0, 1)]
    found = fastfg.evaluate(vit, images, maps[1], target=1, explain=vanilla, **ONE)
    assert found.details["random_logit"]["classes"].tolist() == [[0], [0]]
    expected = [spearman(a, b) for a, b in zip(*maps, strict=True)]
    assert found["random_logit"].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_constant_map_of_the_other_class_is_no_score():
    model, images, maps = toy(((1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 0.0, 0.0)))
    found = fastfg.evaluate(model, images, maps, target=0, explain=contributions, **ONE)
    assert found["random_logit"].isnan().all()
    assert {e.message for e in found.errors} == {"the attribution is the same for every patch for class 1"}


@pytest.mark.parametrize(
    "target",
    [fastfg.Target(0, minus=1), lambda output: output[:, 0], fastfg.Target.similarity(torch.ones(2).double())],
    ids=["contrast", "function", "similarity"],
)
def test_targets_without_another_class(target):
    model, images, maps = toy()
    with pytest.raises(
        ValueError, match="target: expected classes, as random_logit explains another class, got Target"
    ):
        fastfg.evaluate(model, images, maps, target=target, explain=contributions, **ONE)


def test_bad_options():
    model, images, maps = toy()
    with pytest.raises(
        ValueError, match="random_logit: expected n_classes from 1 to 1, as the model has 2 classes, got 2"
    ):
        fastfg.evaluate(model, images, maps, target=0, explain=contributions, random_logit={"n_classes": 2}, **ONE)
    with pytest.raises(ValueError, match="random_logit: expected n_classes >= 1, an integer, got 0"):
        RandomLogit(n_classes=0)
    with pytest.raises(ValueError, match="random_logit: expected correlation in .* got 'ssim'"):
        RandomLogit(correlation="ssim")
