"""The metric in CONTRIBUTING.md is short and runs as written."""

import re
from pathlib import Path

import pytest
import torch

import fastfg
from fastfg.metrics import Metric, Plan

PAGE = Path(fastfg.__file__).parents[1] / "CONTRIBUTING.md"


def keep_top():
    """The metric in CONTRIBUTING.md."""
    (block,) = re.findall(r"```python\n(# my_metric\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) < 25
    namespace: dict = {}
    exec(block, namespace)
    return namespace["KeepTop"]()


def test_the_metric_in_contributing(model, images):
    metric, maps = keep_top(), torch.rand(2, 3, 4, 6)
    scores = fastfg.evaluate(model, images, maps, target=1, metrics=["saco", metric])
    assert list(scores) == ["saco", "keep_top"]
    for c in range(2):
        for i in range(3):
            kept = maps[c, i].flatten().argsort(descending=True, stable=True)[:6]
            image = torch.full_like(images[i], float(images[i].mean()))
            for patch in kept.tolist():
                rows, columns = slice(patch // 6 * 8, patch // 6 * 8 + 8), slice(patch % 6 * 8, patch % 6 * 8 + 8)
                image[:, rows, columns] = images[i][:, rows, columns]
            whole, left = (model(x[None]).softmax(1)[0, 1].item() for x in (images[i], image))
            torch.testing.assert_close(float(scores["keep_top"][c, i]), left / whole, rtol=1e-9, atol=0)
    table = fastfg.compare(model, images, gates={"vanilla": None}, metrics=["saco", metric])
    summary = fastfg.study.summarize(table)
    assert list(summary["metric"]) == ["saco", "keep_top"]
    assert "keep_top |" in fastfg.report.markdown_table(summary)


class Own(Metric):
    """A metric whose parts can be set wrong."""

    name, title, short, higher_is_better = "own", "Own", "O", True

    def __init__(self, plan=None, score=None, **options):
        super().__init__(**options)
        object.__setattr__(self, "given", (plan, score))

    def plan(self, maps, grid, random):
        one = Plan(masks=torch.ones(len(maps), 1, maps.shape[1], dtype=torch.bool))
        return one if self.given[0] is None else self.given[0](maps)

    def score(self, maps, plan, readings):
        return (readings.logit[:, 1], {}) if self.given[1] is None else self.given[1](readings)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Own(plan=lambda maps: Plan(torch.ones(2, 1, 24))), "own: expected plan.masks bool .* got torch.float32"),
        (Own(plan=lambda maps: Plan(torch.ones(1, 1, 24).bool())), r"own: expected plan.masks bool \[2, m, 24\]"),
        (Own(score=lambda readings: (readings.prob, {})), r"own: expected scores \[2\], one per map, got \[2, 2\]"),
        (Own(score=lambda readings: ([1, 2], {})), "own: expected scores .* got list"),
        (Own(score=lambda readings: (readings.prob[:, 0], {"a": torch.ones(3)})), r"own: expected details\['a'\]"),
    ],
)
def test_what_a_metric_returns_is_checked(model, images, metric, message):
    with pytest.raises(ValueError, match=message):
        fastfg.evaluate(model, images, torch.rand(2, 3, 4, 6), target=1, metrics=[metric])


def test_a_metric_is_pure_for_the_others_and_infinite_scores_are_errors(model, images):
    def spoil(maps):
        maps.zero_()
        return Plan(masks=torch.ones(len(maps), 1, maps.shape[1], dtype=torch.bool))

    maps = torch.rand(3, 4, 6)
    endless = Own(plan=spoil, score=lambda readings: (readings.prob[:, 0] / 0, {}))
    found = fastfg.evaluate(model, images, maps, target=1, metrics=[endless, "saco"])
    assert torch.equal(found["saco"], fastfg.evaluate(model, images, maps, target=1, metrics=["saco"])["saco"])
    assert found["own"].isnan().all()
    assert {error.message for error in found.errors} == {"own is not defined here"}


def test_a_metric_that_reads_logits_of_a_saturated_model():
    def model(x):
        z = 1e4 + x.mean((1, 2, 3))
        return torch.stack([z, torch.zeros_like(z)], 1)

    images = torch.rand(3, 3, 32, 48, dtype=torch.float64)
    found = fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=0, metrics=[Own()], baseline="zero")
    assert found.errors == []


@pytest.mark.parametrize("name", ["index", "image", "variant", "target", "error", 3])
def test_a_name_that_a_table_could_not_hold_is_refused(model, images, name):
    metric = type("Named", (Own,), {"name": name})()
    with pytest.raises(ValueError, match="metrics: expected Named.name, a text not among"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=1, metrics=[metric])


def test_a_perfect_map_keeps_everything_and_has_a_score():
    """Nothing changes under its mask, but the model does not ignore the image."""

    def model(x):  # class 0 is the mean of the top left patch
        z = x[..., :8, :8].mean((1, 2, 3))
        return torch.stack([z, -z], 1)

    images, right, wrong = torch.rand(2, 3, 16, 16), torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    right[:, 0, 0], wrong[:, 1, 1] = 1, 1
    options = {"target": 0, "metrics": [keep_top()], "baseline": "zero"}
    both = fastfg.evaluate(model, images, torch.stack([right, wrong]), **options)
    assert both["keep_top"][0].tolist() == [1.0, 1.0]
    assert (both["keep_top"][1] < 1).all()
    assert fastfg.evaluate(model, images, right, **options)["keep_top"].tolist() == [1.0, 1.0]


def test_a_model_that_ignores_the_image_has_no_score():
    def model(x):
        return torch.tensor([[1.0, 2.0]]).expand(len(x), 2)

    found = fastfg.evaluate(model, torch.rand(2, 3, 16, 16), torch.rand(2, 2, 2), target=0, metrics=[keep_top()])
    assert found["keep_top"].isnan().all()
    assert {error.message for error in found.errors} == {"removing patches does not change the reading"}
