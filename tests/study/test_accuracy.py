"""Accuracy by class, on counts worked out by hand."""

import math
from pathlib import Path

import pytest

from fastfg.study.accuracy import Accuracy


@pytest.mark.parametrize("confusion", [[[1]], [], 3, [[1, 2], [3]], [[0.5, 1], [1, 2]], [["a", 1], [1, 2]]])
def test_stored_counts_that_do_not_fit_are_named(confusion):
    with pytest.raises(ValueError, match=r"a\.json: expected labels and \[n, n\] counts, got"):
        Accuracy.read(["a", "b"], confusion, Path("a.json"))
    assert Accuracy.read(["a", "b"], [[1, 2], [3, 4]], Path("a.json")).confusion == ((1, 2), (3, 4))


def test_unequal_classes_by_hand():
    # 8 of a, all called a; 2 of b, one called a and one b
    found = Accuracy.of(("a", "b"), [0] * 8 + [1, 1], [0] * 8 + [0, 1])
    assert found.confusion == ((8, 0), (1, 1))
    assert found.images == 10
    assert found.accuracy == 0.9
    assert found.majority == ("a", 0.8)
    assert found.balanced == (1 + 0.5) / 2
    a, b = found.by_class()
    assert (a["images"], a["correct"], a["predicted"]) == (8, 8, 9)
    assert (b["images"], b["correct"], b["predicted"], b["accuracy"]) == (2, 1, 1, 0.5)
    z = 1.959963984540054  # the Wilson interval of 1 of 2
    half = z / (1 + z * z / 2) * math.sqrt(0.25 / 2 + z * z / 16)
    assert (b["low"], b["high"]) == pytest.approx((0.5 - half, 0.5 + half))


def test_always_one_class_is_said():
    found = Accuracy.of(("functional", "defective"), [0] * 95 + [1] * 5, [0] * 100)
    assert (found.accuracy, found.balanced) == (0.95, 0.5)
    text = "\n".join(found.sentences("validation"))
    assert text.startswith(
        "validation: balanced accuracy 50.0%, accuracy 95.0% on 100 images (always 'functional': 95.0%)"
    )
    assert "defective: 0 of 5 = 0.0% (95% interval 0.0% to 43.4%, few images)" in text
    assert "Its accuracy is no better than that of always answering 'functional'." in text


def test_accuracy_above_the_majority_and_chance_by_class():
    found = Accuracy.of(("a", "b"), [0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    assert "no better" not in "\n".join(found.sentences("test"))


def test_a_class_without_images():
    found = Accuracy.of(("a", "b", "c"), [0, 1, 1], [0, 1, 2])
    assert found.balanced == 0.75
    assert found.by_class()[2] == {
        "label": "c",
        "images": 0,
        "correct": 0,
        "accuracy": None,
        "low": None,
        "high": None,
        "predicted": 1,
    }
    assert "c: no images, so it is not in the balanced accuracy" in "\n".join(found.sentences("test"))


def test_no_images():
    found = Accuracy.of(("a", "b"), [], [])
    assert found.images == 0
    assert math.isnan(found.accuracy)
    assert math.isnan(found.balanced)
    assert found.sentences("test") == ["test: no images, so no accuracy"]
