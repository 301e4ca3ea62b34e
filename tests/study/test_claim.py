"""The claim: it holds only if all of its conditions do, worked out on small tables."""

import re

import numpy as np
import pandas as pd
import pytest

from fastfg.study.answer import answer
from fastfg.study.claim import GATE, SHUFFLED, VANILLA, judge_claim, with_mean_of_shuffled
from fastfg.study.config import Protocol
from fastfg.study.contents import _at_the_edge
from fastfg.study.paired import paired


def table(n=24, **gains):
    """Scores of ``n`` images. ``gains``: {variant: (in SRG, in MIF, in LIF)} over vanilla; lower MIF is better."""
    random = np.random.default_rng(0)
    base, noise = random.normal(0.3, 0.2, n), random.normal(0, 0.02, (n, 8))
    rows = []
    for number, (variant, (srg, mif, lif)) in enumerate({VANILLA: (0, 0, 0), **gains}.items()):
        e = noise[:, number]
        for i in range(n):
            scores = {"srg": base[i] + srg + e[i], "deletion": 0.2 + mif - e[i] / 2, "insertion": 0.5 + lif + e[i] / 2}
            rows.append({"image": f"{i:02}", "variant": variant, "target": 0, **scores, "error": None})
    found = pd.DataFrame(rows)
    found.attrs["metrics"] = ["srg", "deletion", "insertion"]
    return found


GOOD = {GATE: (0.1, -0.05, 0.05), "permuted": (0.02, -0.01, 0.01), "random": (-0.3, 0.1, -0.2)}


def judged(primary, second, controls=("permuted", "random")):
    return judge_claim({"mean": table(**primary), "removed": table(**second)}, controls)


def test_all_conditions_hold():
    found = judged(GOOD, GOOD)
    assert found.claim.holds
    assert found.strongest == "permuted"
    assert all(condition.holds for condition in found.claim.conditions)
    assert len(found.claim.conditions) == 5
    assert "improves explanations" in found.claim.sentence
    assert re.search(
        r"strongest control, permuted, by \+0\.0\d+ \[.*\]; that control alone has \d+% of", found.claim.sentence
    )
    means = table(**GOOD).pivot(index="image", columns="variant", values="srg").mean()
    share = (means["permuted"] - means[VANILLA]) / (means[GATE] - means[VANILLA])
    assert f" {share:.0%} of the gain" in found.claim.sentence
    effect = found.claim.effects[0]
    assert effect.difference == pytest.approx(0.1, abs=0.02)
    assert effect.low < effect.difference < effect.high
    assert (effect.variant, effect.against, effect.verdict) == (GATE, VANILLA, "better")


def test_a_control_that_is_as_good_stops_the_claim():
    found = judged(GOOD | {"permuted": GOOD[GATE]}, GOOD)
    assert not found.claim.holds
    failed = [condition.text for condition in found.claim.conditions if not condition.holds]
    assert failed[0].startswith("Better than the strongest control, permuted")
    assert "No improvement can be claimed" in found.claim.sentence
    assert found.claim.sentence.endswith("2 of 5 conditions fail.")


def scored_only(table, variants, images):
    """``table``, where ``variants`` have scores on the first ``images`` images alone."""
    lost = table["variant"].isin(variants) & (table["image"] >= f"{images:02}")
    table.loc[lost, ["srg", "deletion", "insertion"]] = np.nan
    return table


def test_a_share_is_not_said_where_the_gate_has_no_gain():
    # on the images of permuted, vanilla is ahead of both; on all, the gate is ahead of vanilla
    found = scored_only(table(48, **GOOD), ["permuted"], 20)
    few = found["image"] < "20"
    found.loc[few & (found["variant"] == VANILLA), "srg"] += 0.12
    found.loc[~few & (found["variant"] == VANILLA), "srg"] -= 0.1
    claim = judge_claim({"mean": found}, ["permuted"]).claim
    assert claim.holds
    assert claim.sentence.endswith("; that control's share of the gain over vanilla is not known.")
    assert "% of the gain" not in claim.sentence


def test_a_share_is_not_said_where_no_image_has_all_scores():
    found = table(48, **GOOD)
    for variant, lost in ((VANILLA, found["image"] < "20"), ("permuted", found["image"] >= "20")):
        found.loc[lost & (found["variant"] == variant), ["srg", "deletion", "insertion"]] = np.nan
    sentence = judge_claim({"mean": found}, ["permuted"]).claim.sentence
    assert "that control's share of the gain over vanilla is not known" in sentence


def test_missing_scores_are_said():
    found = judge_claim({"mean": scored_only(table(48, **GOOD), [GATE], 12)}, ["permuted", "random"])
    assert "n = 12 of 48)" in found.claim.sentence
    found = judge_claim({"mean": scored_only(table(48, **GOOD), ["random"], 12)}, ["permuted", "random"])
    assert found.claim.conditions[2].detail == "2 controls, each on at least 12 of 48 images"


def test_rounding_is_not_ahead():
    both = {name: (srg, mif, 0.0) for name, (srg, mif, _) in GOOD.items()}
    found = table(**both)
    found["insertion"] = np.where(found["variant"] == GATE, np.nextafter(0.5, 1), 0.5)
    signs = judge_claim({"mean": found}, ["permuted", "random"]).signs
    assert list(signs.loc[signs["order"] == "LIF", "gain"]) == [0, 0]


def test_a_seed_without_a_row_is_missing():
    found = table(4, **{GATE: (0.1, 0, 0), "shuffled 0": (0, 0, 0), "shuffled 1": (0.2, 0, 0)})
    found = found[(found["variant"] != "shuffled 1") | (found["image"] != "03")]
    found.attrs["metrics"] = ["srg"]
    means = with_mean_of_shuffled(found, ["shuffled 0", "shuffled 1"]).query("variant == @SHUFFLED")["srg"]
    assert means.isna().tolist() == [False, False, False, True]


def test_a_worse_gate_stops_the_claim():
    found = judged(GOOD | {GATE: (-0.1, 0.05, -0.05)}, GOOD)
    assert not found.claim.holds
    assert not found.claim.conditions[0].holds
    assert found.claim.effects[0].verdict == "worse"


def test_three_of_four_modes():
    found = judged(GOOD, GOOD | {GATE: (0.1, 0.05, 0.05)})  # removed: MIF is worse, LIF better
    assert found.claim.holds
    assert "3 of 4" in found.claim.conditions[3].detail
    found = judged(GOOD, GOOD | {GATE: (0.1, 0.05, -0.05)})
    assert not found.claim.holds
    assert [condition.holds for condition in found.claim.conditions] == [True, True, True, False, False]
    assert "2 of 4" in found.claim.conditions[3].detail


def test_the_signs_by_hand():
    rows = [("a", VANILLA, 0.5, 0.4), ("a", GATE, 0.3, 0.7), ("b", VANILLA, 0.1, 0.2), ("b", GATE, 0.2, 0.2)]
    scores = pd.DataFrame(rows, columns=["image", "variant", "deletion", "insertion"]).assign(srg=[0.1, 0.4, 0.2, 0.1])
    scores.attrs["metrics"] = ["srg", "deletion", "insertion"]
    signs = judge_claim({"mean": scores}, []).signs.set_index("order")["gain"]
    assert signs["MIF"] == pytest.approx(0.05)  # (0.2 - 0.1) / 2: a lower MIF curve is better
    assert signs["LIF"] == pytest.approx(0.15)


def test_without_controls_nothing_is_claimed():
    found = judged(GOOD, GOOD, controls=())
    assert not found.claim.holds
    assert "no control was judged" in [condition.detail for condition in found.claim.conditions]


def test_few_images_cannot_tell():
    found = judge_claim({"mean": table(n=3, **GOOD)}, ["permuted"])
    assert not found.claim.holds
    assert "Holm corrects" in found.claim.conditions[0].detail


def test_the_mean_of_the_shuffled_decoders_is_one_variant():
    scores = table(n=2, **{"s 1": (0.1, 0, 0), "s 2": (0.3, 0, 0)})
    scores.loc[(scores["variant"] == "s 2") & (scores["image"] == "01"), "srg"] = np.nan
    found = with_mean_of_shuffled(scores, ["s 1", "s 2"])
    own = found[found["variant"] == SHUFFLED].set_index("image")["srg"]
    both = scores[scores["variant"].str.startswith("s ") & (scores["image"] == "00")]["srg"]
    assert own["00"] == pytest.approx(both.mean())
    assert np.isnan(own["01"])  # not the mean of the one that is left
    assert found.attrs["metrics"] == scores.attrs["metrics"]
    assert len(with_mean_of_shuffled(scores, [])) == len(scores)


def test_a_control_without_scores_or_with_few_is_not_beaten():
    scores = table(n=24, **GOOD, **{"SAE error": (0, 0, 0)})
    scores.loc[scores["variant"] == "SAE error", ["srg", "deletion", "insertion"]] = np.nan
    found = judge_claim({"mean": scores}, ["permuted", "random", "SAE error"])
    assert not found.claim.holds
    assert "SAE error" in found.claim.conditions[2].detail
    few = table(n=24, **GOOD, **{SHUFFLED: (-0.2, 0.1, -0.1)})
    few.loc[(few["variant"] == SHUFFLED) & (few["image"] > "02"), "srg"] = np.nan
    found = judge_claim({"mean": few}, ["permuted", "random", SHUFFLED])
    assert found.strongest == "permuted"
    assert not found.claim.holds
    assert SHUFFLED in found.claim.conditions[2].detail


def test_three_quarters_of_six_are_five():
    worse = GOOD | {GATE: (0.1, 0.05, -0.05)}
    found = judge_claim(
        {"mean": table(**GOOD), "removed": table(**GOOD), "blur": table(**worse)}, ["permuted", "random"]
    )
    assert "at least 5 of 6" in found.claim.conditions[3].text
    assert not found.claim.holds


def test_a_vanilla_without_scores_is_said_in_words():
    scores = table(n=24, **GOOD)
    scores.loc[scores["variant"] == VANILLA, ["srg", "deletion", "insertion"]] = np.nan
    claim = judge_claim({"mean": scores}, ["permuted", "random"]).claim
    assert not claim.holds
    said = " ".join([claim.sentence, *(f"{one.text} {one.detail}" for one in claim.conditions)])
    assert "nan" not in said
    assert "SRG, gate minus vanilla: no difference can be computed, not tested, n = 0" in claim.sentence


def test_both_kinds_of_claim_have_the_same_words():
    scores = table(n=24, **GOOD)
    by_answer, _ = answer(scores, paired(scores, VANILLA, metrics=["srg"]), GATE, controls=["permuted", "random"])
    by_study = judge_claim({"mean": scores}, ["permuted", "random"]).claim
    for one, other in zip(by_study.conditions[:3], by_answer.conditions, strict=True):
        assert other.text == f"SRG: {one.text[0].lower()}{one.text[1:]}"
    assert by_study.conditions[2].detail == by_answer.conditions[2].detail == "2 controls"
    for one, other in zip(by_study.conditions[:2], by_answer.conditions[:2], strict=True):
        pattern = r"\+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\], Holm p < \.001, n = 24"
        assert re.match(pattern, one.detail)
        assert re.match(pattern, other.detail)


def test_fewer_images_of_the_strongest_control_are_said():
    all_images = judged(GOOD, GOOD).claim.sentence
    assert " images" not in all_images
    scores = table(n=24, **GOOD)
    scores.loc[(scores["variant"] == "permuted") & (scores["image"] > "07"), "srg"] = np.nan
    found = judge_claim({"mean": scores}, ["permuted", "random"])
    assert found.claim.holds
    assert re.search(r"permuted, by \+0\.0\d+ \[\S+ \S+\] on 8 images; that control", found.claim.sentence)
    grouped = judge_claim({"mean": scores.assign(group=scores["image"].astype(int) % 12)}, ["permuted", "random"])
    assert "n = 24 in 12 groups" in grouped.claim.sentence
    assert [(one.n, one.groups) for one in grouped.claim.effects] == [(24, 12), (8, 8)]


def test_a_control_without_a_gain_is_said():
    found = judged(GOOD | {"permuted": (-0.05, 0.02, -0.02)}, GOOD)
    assert found.claim.sentence.endswith("that control alone has no gain over vanilla.")


def test_a_choice_at_the_edge_of_what_was_compared_is_said():
    protocol = Protocol(layers=[1], kappa=[0.1, 0.5, 1.0], c_max=[10.0])
    assert _at_the_edge(protocol, {"kappa": 0.5, "c_max": 10.0}) == []
    assert _at_the_edge(protocol, {"kappa": 1.0, "c_max": 10.0}) == [
        "kappa 1 was chosen, the largest that was compared: one beyond it may score higher."
    ]
    assert "smallest" in _at_the_edge(protocol, {"kappa": 0.1, "c_max": 10.0})[0]


def test_one_control_is_not_several():
    found = judged(GOOD, GOOD, controls=("random",))
    every = next(one for one in found.claim.conditions if "every control" in one.text)
    assert every.holds
    assert every.detail == "1 control"
    assert "2 controls" in [one.detail for one in judged(GOOD, GOOD).claim.conditions]
