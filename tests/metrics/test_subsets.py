"""Infidelity and sensitivity-n: by hand, against one image at a time, and from the forwards of other metrics."""

import itertools

import pytest
import torch

import fastfg
from tests.metrics.test_curves import ones, row, scores

SUBSETS = torch.tensor(list(itertools.combinations(range(4), 2)))[None, :, None]  # [1, 6, 1, 2], all pairs


def test_infidelity_by_hand():
    """The map is right up to a factor of 2, so the drop is twice the sum: weights 2 4 6 8, map 1 2 3 4."""
    found = scores([2, 4, 6, 8], [1.0, 2, 3, 4], metrics=["infidelity"], infidelity={"subsets": SUBSETS})
    sums = [3, 4, 5, 5, 6, 7]
    assert float(found["infidelity"]) == pytest.approx(sum(s * s for s in sums) / 6)
    assert float(found.details["infidelity"]["scale"]) == pytest.approx(2)
    assert float(found.details["infidelity"]["scaled"]) == pytest.approx(0, abs=1e-15)


def test_the_scale_is_the_best_one():
    found = scores([2, -4, 6, 8], [1.0, 2, 3, 5], metrics=["infidelity"], infidelity={"subsets": SUBSETS})
    a = torch.tensor([3.0, 4, 6, 5, 7, 8]).double()
    d = torch.tensor([-2.0, 8, 10, 2, 4, 14]).double()
    scale, scaled = (float(found.details["infidelity"][name]) for name in ("scale", "scaled"))
    assert float(found["infidelity"]) == pytest.approx(float((a - d).square().mean()))
    assert scaled == pytest.approx(float((scale * a - d).square().mean()))
    for other in (scale - 0.01, scale + 0.01):
        assert float((other * a - d).square().mean()) > scaled


def test_sensitivity_n_by_hand():
    """An additive model and its own weights: the correlation is 1 for every n; for others it is Pearson's."""
    perfect = scores([2, 4, 6, 8], [1.0, 2, 3, 4], metrics=["sensitivity_n"], sensitivity_n={"n": [1, 2, 3]})
    assert perfect.details["sensitivity_n"]["correlation"].tolist() == [pytest.approx([1, 1, 1])]
    assert perfect.details["sensitivity_n"]["n"].tolist() == [[1, 2, 3]]
    assert float(perfect["sensitivity_n"]) == pytest.approx(1)


def test_one_image_at_a_time(model, images):
    """Against the definition, with the subsets that Faithfulness Correlation reports."""
    maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    metrics = ["faithfulness_correlation", "infidelity", "sensitivity_n"]
    found = fastfg.evaluate(model, images, maps, target=2, metrics=metrics)
    assert found.forwards["run"] == 3 * (1 + 60)  # the same subsets
    subsets = found.details["faithfulness_correlation"]["subsets"].flatten(1, 2)
    for i in range(3):
        sums, drops = [], []
        for subset in subsets[i].tolist():
            image = images[i].clone()
            for patch in subset:
                image[:, patch // 6 * 8 : patch // 6 * 8 + 8, patch % 6 * 8 : patch % 6 * 8 + 8] = images[i].mean()
            with torch.no_grad():
                drops.append(float(model(images[i][None])[0, 2] - model(image[None])[0, 2]))
            sums.append(float(maps[i].flatten()[subset].sum()))
        a, d = torch.tensor(sums).double(), torch.tensor(drops).double()
        assert float(found["infidelity"][i]) == pytest.approx(float((a - d).square().mean()), rel=1e-7)
        expected = float(torch.corrcoef(torch.stack([a, d]))[0, 1])
        assert float(found["sensitivity_n"][i]) == pytest.approx(expected, abs=1e-7)


def test_sizes_that_say_nothing():
    found = scores([2, 4, 6, 8], [1.0, 2, 3, 4], metrics=["sensitivity_n"], sensitivity_n={"n": 4})
    (error,) = found.errors
    assert error.message == "the attribution is the same for all subsets of one size"
    assert found["sensitivity_n"].isnan().all()


def test_alone_or_in_any_batch(model, images):
    maps = torch.rand(3, 4, 6)
    metrics = ["infidelity", "sensitivity_n"]
    options = {"target": 2, "metrics": metrics, "keys": ["a", "b", "c"]}
    together = fastfg.evaluate(model, images, maps, **options)
    alone = fastfg.evaluate(model, images[1:2], maps[1:2], **(options | {"keys": ["b"]}))
    for name in metrics:
        assert float(alone[name]) == pytest.approx(float(together[name][1]), rel=1e-9)


def test_a_patch_twice_in_a_subset():
    given = torch.tensor([[0, 1], [2, 2], [1, 3]])[None, :, None]
    with pytest.raises(ValueError, match="infidelity: expected subsets of different patches, got one with the same"):
        scores([2, 4, 6, 8], [1.0, 2, 3, 4], metrics=["infidelity"], infidelity={"subsets": given})


def test_subsets_are_given_per_image():
    with pytest.raises(ValueError, match="infidelity: expected subsets for 1 images in dimension 2"):
        fastfg.evaluate(
            lambda x: x.mean((2, 3)).double(),
            ones(4),
            row([1.0, 2, 3, 4]),
            target=0,
            metrics=["infidelity"],
            infidelity={"subsets": SUBSETS.repeat(1, 1, 2, 1)},
        )
