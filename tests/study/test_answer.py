"""The answer for one comparison, worked out on small tables: every control counts, and what is worse is said."""

import numpy as np
import pandas as pd
import pytest

from fastfg.study.answer import answer
from fastfg.study.paired import paired

NOISE = 0.002 * (np.arange(24) % 3 - 1)  # so that differences vary


def table(n=24, **gains):
    """SRG and SaCo of ``n`` images; image i has i / 10 more. ``gains``: {variant: (in SRG, in SaCo)} over vanilla."""
    rows = [
        {"index": i, "image": f"{i:02}", "variant": variant, "srg": own + srg, "saco": own + saco}
        for number, (variant, (srg, saco)) in enumerate({"vanilla": (0.0, 0.0), **gains}.items())
        for i in range(n)
        for own in [i / 10 + number * NOISE[i]]
    ]
    found = pd.DataFrame(rows)
    found.attrs["metrics"] = ["srg", "saco"]
    return found


def without(scores, variant, first=0):
    """``scores`` without those of ``variant`` from image ``first`` on."""
    scores.loc[(scores["variant"] == variant) & (scores["index"] >= first), ["srg", "saco"]] = np.nan
    return scores


def claimed(scores, *controls, **options):
    return answer(scores, paired(scores), "gated", controls=controls, **options)[0]


def conditions(claim, metric):
    return [one for one in claim.conditions if one.text.startswith(f"{metric}: ")]


GATED = (0.2, 0.0)


def test_what_is_better_and_no_control_is_said():
    scores = table(gated=GATED, random=(-0.1, 0.0), rollout=(0.5, 0.0), grad_cam=(0.1, 0.0))
    claim = claimed(scores, "random", others=["rollout", "grad_cam"])
    assert claim.holds
    assert "and is worse than rollout by SRG (SRG, gated minus" in claim.sentence
    assert len(conditions(claim, "SRG")) == 3
    assert claim.effects == claimed(scores, "random").effects  # others have a correction of their own


def test_one_metric():
    claim = claimed(table(gated=GATED, random=(-0.1, 0.0)).drop(columns="saco"), "random")
    assert claim.sentence.startswith("gated beats vanilla and every control by SRG (SRG, gated minus")
    claim = claimed(table(gated=(0.0, 0.0), random=(-0.1, 0.0)).drop(columns="saco"), "random")
    assert "gated does not beat vanilla and every control by SRG (" in claim.sentence


def test_a_method_that_beats_all():
    scores = table(gated=GATED, random=(-0.1, 0.0), centre=(0.1, 0.0), rollout=(0.5, 0.0))
    claim, tables = answer(scores, paired(scores), "gated", controls=["random", "centre"])
    assert claim.holds
    assert claim.sentence.startswith("gated beats vanilla and every control by SRG, 1 of 2 metrics (SRG, gated minus")
    vanilla, strongest, every = conditions(claim, "SRG")
    assert vanilla.text == "SRG: better than vanilla (Holm p < .05)"
    assert strongest.text == "SRG: better than the strongest control, centre (Holm p < .05)"
    assert (every.text, every.detail) == ("SRG: better than every control (Holm p < .05)", "2 controls")
    assert [vanilla.holds, strongest.holds, every.holds] == [True, True, True]
    over = claim.effects[1]
    assert (over.variant, over.against, over.metric, over.verdict) == ("gated", "centre", "srg", "better")
    assert over.difference == pytest.approx(0.1)
    assert over.low < over.difference < over.high
    assert list(tables) == ["gated"]
    assert set(tables["gated"]["variant"]) == {"vanilla", "random", "centre"}  # Holm counts these, in both metrics


def test_controls_without_scores_are_not_beaten():
    claim = claimed(without(table(gated=GATED, random=(0.0, 0.0)), "random"), "random")
    assert claim.holds is False
    assert "No improvement can be claimed: gated does not beat vanilla and every control" in claim.sentence
    assert claim.sentence.endswith("; random has no scores.")
    vanilla, every = conditions(claim, "SRG")
    assert vanilla.holds
    assert every.holds is False
    assert every.detail == "not better than random, which has no scores"


def test_one_control_without_scores_beside_one_that_is_beaten():
    scores = without(table(gated=GATED, random=(0.0, 0.0), centre=(0.0, 0.0)), "random")
    claim = claimed(scores, "random", "centre", "edges")
    assert claim.holds is False
    _, strongest, every = conditions(claim, "SRG")
    assert strongest.holds
    assert every.detail == "not better than random, which has no scores; edges, which has no scores"
    assert claim.sentence.endswith("; random, edges have no scores.")


def test_a_control_on_too_few_images_is_not_beaten():
    scores = without(table(gated=GATED, random=(0.0, 0.0), centre=(0.1, 0.0)), "random", first=3)
    claim = claimed(scores, "random", "centre")
    assert claim.holds is False
    _, strongest, every = conditions(claim, "SRG")
    assert "centre" in strongest.text
    assert every.detail.startswith("not better than random: +0.2")
    assert "n = 3 of 24: cannot tell" in every.detail
    assert "have no scores" not in claim.sentence


def test_a_control_on_no_common_image_is_not_beaten():
    scores = without(table(gated=GATED, random=(0.0, 0.0)), "gated", first=12)
    scores.loc[(scores["variant"] == "random") & (scores["index"] < 12), ["srg", "saco"]] = np.nan
    claim = claimed(scores, "random")
    assert claim.holds is False
    assert "no difference can be computed, not tested, n = 0" in conditions(claim, "SRG")[1].detail


def test_the_strongest_control_is_chosen_on_common_images():
    # On images 00 to 07, whose scores are low: its mean is 0.53, that of centre 1.25, yet gated is ahead by 0.02 only.
    scores = without(table(gated=GATED, few=(0.18, 0.0), centre=(0.1, 0.0)), "few", first=8)
    claim = claimed(scores, "few", "centre")
    strongest = conditions(claim, "SRG")[1]
    assert "the strongest control, few" in strongest.text
    assert strongest.detail.endswith("n = 8 of 24: better")
    assert claim.holds
    scores = without(table(gated=GATED, few=GATED, centre=(0.1, 0.0)), "few", first=8)
    assert not claimed(scores, "few", "centre").holds


def test_a_lower_metric_has_its_own_strongest_control():
    scores = table(gated=(-0.2, 0.0), near=(-0.1, 0.0), far=(0.3, 0.0))
    scores = scores.rename(columns={"srg": "deletion"})
    scores.attrs["metrics"] = ["deletion", "saco"]
    claim = claimed(scores, "far", "near")
    assert claim.holds
    assert "the strongest control, near" in claim.conditions[1].text
    assert claim.effects[1].difference == pytest.approx(-0.1)


def test_what_is_worse_is_said():
    claim = claimed(table(gated=(0.2, -0.2), random=(0.0, -0.5), centre=(0.0, 0.0)), "random", "centre")
    assert claim.holds
    said = "by SRG, 1 of 2 metrics, and is worse than vanilla by SaCo and than centre by SaCo ("
    assert said in claim.sentence
    nothing = claimed(table(gated=(0.0, -0.2), random=(-0.1, -0.5)), "random")
    assert not nothing.holds
    assert "every control by any of 2 metrics, and is worse than vanilla by SaCo (" in nothing.sentence


def test_without_a_control_nothing_is_claimed():
    claim = claimed(table(gated=GATED))
    assert claim.holds is False
    start = "No improvement can be claimed: no control was judged; gated beats vanilla by SRG, 1 of 2 metrics (SRG, "
    assert claim.sentence.startswith(start)
    assert [one.holds for one in conditions(claim, "SRG")] == [True, False]
    assert conditions(claim, "SRG")[1].detail == "no control was judged"
    worse = claimed(table(gated=(-0.2, 0.0))).sentence
    assert "no control was judged; gated does not beat vanilla by any of 2 metrics, and is worse than vanilla" in worse


def test_groups_are_counted():
    scores = table(gated=GATED, random=(0.0, 0.0))
    scores["group"] = scores["index"] // 3
    claim = claimed(scores, "random")
    assert claim.holds
    assert "n = 24 in 8 groups" in claim.sentence
    assert all("n = 24 in 8 groups" in one.detail for one in conditions(claim, "SRG")[:2])
    assert {(one.n, one.groups) for one in claim.effects} == {(24, 8)}


def test_a_direction_that_is_not_known_claims_nothing():
    scores = table(gated=GATED, random=(0.0, 0.0)).rename(columns={"srg": "mine"}).drop(columns="saco")
    scores.attrs["metrics"] = ["mine"]
    claim = claimed(scores, "random")
    assert claim.holds is False
    over, every = claim.conditions
    assert over.holds is None
    assert "higher" in over.detail
    assert every.holds is False
    by = answer(scores, paired(scores, higher_is_better={"mine": True}), "gated", controls=["random"])[0]
    assert by.holds
    assert by.effects[1].against == "random"
