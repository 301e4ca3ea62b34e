"""The conditions that a study's claim and a folder's comparison share."""

from __future__ import annotations

import pytest

from fastfg.report.contents import Effect
from fastfg.study.conditions import better_than, better_than_every, strongest_control


def effect(against, difference=0.1, verdict="better", reason=None):
    return Effect(
        "gate", against, "srg", difference, difference - 0.1, difference + 0.1, 0.01, 12, verdict, None, reason
    )


def test_the_strongest_control_is_the_one_with_the_smallest_gain_over_it():
    over = {name: effect(name, gain) for name, gain in (("random", 0.3), ("frozen", 0.1), ("blurred", float("nan")))}
    controls = ["random", "frozen", "blurred", "absent"]
    assert strongest_control(over, controls) == "frozen"
    assert strongest_control(over, controls, higher_is_better=False) == "random"
    assert strongest_control(over, controls, higher_is_better=None) is None
    assert strongest_control(over, ["blurred", "absent"]) is None


@pytest.mark.parametrize(
    ("verdict", "holds"),
    [("better", True), ("worse", False), ("no real difference", False), ("cannot tell", None), ("not tested", None)],
)
def test_a_condition_is_open_where_the_test_cannot_tell(verdict, holds):
    condition = better_than(effect("vanilla", verdict=verdict, reason="only one pair"))
    assert condition.holds is holds
    assert condition.detail.endswith(f": {verdict} (only one pair)")


def test_every_control_must_be_beaten():
    over = {"random": effect("random"), "frozen": effect("frozen", verdict="no real difference")}
    assert better_than_every(over, ["random"], {"random"}).detail == "1 control"
    assert better_than_every(over, ["random"], {"random"}).holds
    condition = better_than_every(over, ["random", "frozen", "absent"], {"random", "frozen"})
    assert not condition.holds
    assert "random" not in condition.detail
    assert "frozen: +0.1000" in condition.detail
    assert condition.detail.endswith("absent, which has no scores")


def test_without_controls_no_control_is_beaten():
    assert not better_than_every({}, [], set()).holds
