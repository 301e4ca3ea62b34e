"""``evaluate(..., explain=)``: what it must be, what it must return, and ``compare``, which passes its own."""

import pytest
import torch

import fastfg
from fastfg.metrics import METRICS, ExplanationMetric
from tests.metrics.explain_again import contributions, toy, vanilla

NAMES = [name for name, metric in METRICS.items() if issubclass(metric, ExplanationMetric)]


def test_there_are_four():
    assert set(NAMES) == {
        "max_sensitivity",
        "parameter_randomization",
        "efficient_parameter_randomization",
        "random_logit",
    }
    for name in NAMES:
        metric = METRICS[name]
        assert metric.value_range and metric.cost and metric.source and metric.failings


@pytest.mark.parametrize("name", NAMES)
def test_needs_the_function(name):
    model, images, maps = toy()
    with pytest.raises(ValueError, match=rf"explain: expected the function .* as {name} explains images again, got No"):
        fastfg.evaluate(model, images, maps, target=0, metrics=[name])


@pytest.mark.parametrize(
    ("explain", "metrics", "error", "message"),
    [
        (contributions, ["saco"], ValueError, "explain: expected None, as no metric explains images again"),
        (3, ["max_sensitivity"], TypeError, "explain: expected a function .* got int"),
        (lambda *_: 3, ["max_sensitivity"], ValueError, r"explain: expected maps \[8, 2, 2\] for 8 images, .* got int"),
        (lambda m, x, t: torch.ones(3, 4), ["max_sensitivity"], ValueError, r"explain: .* got torch.float32 \[3, 4\]"),
        (
            lambda m, x, t: contributions(m, x, t) * 1.5,
            ["max_sensitivity"],
            ValueError,
            "explain: expected the given maps for the images as they are, got a difference of 50% .* image 0",
        ),
        (lambda m, x, t: contributions(m, x, t) * torch.nan, ["max_sensitivity"], ValueError, "a difference of nan%"),
    ],
)
def test_what_the_function_is_and_returns(explain, metrics, error, message):
    model, images, maps = toy()
    with pytest.raises(error, match=message):
        fastfg.evaluate(model, images, maps, target=0, metrics=metrics, explain=explain)


@pytest.mark.parametrize(
    ("target", "kind"),
    [(torch.tensor([1, 0, 2]), torch.Tensor), (fastfg.Target([1, 0, 2], link="sigmoid"), fastfg.Target)],
)
def test_the_target_comes_in_the_form_in_which_it_was_given(model, images, target, kind):
    seen = []

    def explain(model, images, target):
        seen.append(target)
        return vanilla(model, images, target)

    maps = fastfg.attribute(model, images, target=target).maps
    found = fastfg.evaluate(model, images, maps, target=target, metrics=NAMES, explain=explain)
    assert all(isinstance(one, kind) for one in seen)
    assert found.errors == []
    assert list(found) == NAMES


def test_a_target_function(model, images):
    def target(output):
        return output[:, 1] - output[:, 0]

    maps = fastfg.attribute(model, images, target=target).maps
    options = {"target": target, "explain": vanilla}
    found = fastfg.evaluate(model, images, maps, metrics=NAMES[:3], **options)
    assert found.errors == []
    with pytest.raises(
        ValueError, match="target: expected classes, as random_logit explains another class, got Target f"
    ):
        fastfg.evaluate(model, images, maps, metrics=["random_logit"], **options)


def test_beside_other_metrics_and_in_a_context_without_gradients(model, images):
    maps, calls = fastfg.attribute(model, images, target=1).maps, []
    options = {"target": 1, "explain": vanilla, "progress": lambda *done: calls.append(done)}
    with torch.no_grad():
        found = fastfg.evaluate(model, images, maps, metrics=["random_logit", "saco"], **options)
    alone = fastfg.evaluate(model, images, maps, target=1, metrics=["saco"])
    assert list(found) == ["random_logit", "saco"]
    assert torch.equal(found["saco"], alone["saco"])
    assert "attributions" not in alone.forwards
    assert calls == [(3, 3)]


def test_compare_passes_its_own(model, images, saes, gate):
    gates = {"vanilla": None, "gated": gate}
    options = {"metrics": ["saco", *NAMES], "max_sensitivity": {"n_samples": 2}, "keys": [*"abc"], "target": 1}
    table = fastfg.compare(model, images, gates=gates, saes=saes, **options)
    assert table["error"].isna().all()
    assert table[["saco", *NAMES]].notna().all(axis=None)
    alone = fastfg.compare(model, images[1:2], gates={"gated": gate}, saes=saes, **options | {"keys": ["b"]})
    row = table[(table["image"] == "b") & (table["variant"] == "gated")]
    for name in NAMES:
        assert float(row[name].iloc[0]) == pytest.approx(float(alone[name].iloc[0]), rel=1e-9)
