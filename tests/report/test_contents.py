"""The parts of a report say what they need, by name."""

import numpy as np
import pandas as pd
import pytest

from fastfg.report.contents import Claim, Contents, Effect, ImageEntry, PatchEvidence, Variant
from fastfg.study import paired

SCORES = pd.DataFrame(
    [(i, f"{i}.jpg", v, i * 0.1 + (v == "gated") * 0.1) for i in range(6) for v in ("vanilla", "gated")],
    columns=["index", "image", "variant", "saco"],
)
CLAIM = Claim("Nothing is claimed.", holds=False)


def evidence(P=4, n=2):
    one = np.zeros(P)
    return {
        "features": np.zeros((P, n), int),
        "contributions": np.zeros((P, n)),
        **dict.fromkeys(("remaining", "active", "scores", "z", "gates", "sae_error", "bias", "g_dot_x"), one),
    }


def test_a_claim_and_the_scores_are_enough():
    assert Contents("title", [CLAIM], SCORES).key == "image"
    assert Contents("title", [CLAIM], SCORES.rename(columns={"image": "key"})).key == "key"


def test_an_effect_is_a_row_of_the_paired_table():
    found = Effect.of(paired(SCORES), "gated", "saco", "vanilla")
    assert (found.n, found.groups) == (6, 6)
    assert found.difference == pytest.approx(0.1)
    grouped = paired(SCORES, groups=[0, 0, 1, 1, 2, 2])
    assert Effect.of(grouped, "gated", "saco", "vanilla").groups == 3
    with pytest.raises(ValueError, match="paired: expected one row for 'gated' and 'srg', got 0"):
        Effect.of(paired(SCORES), "gated", "srg", "vanilla")


def test_an_effect_the_other_way_round():
    one = Effect("a", "b", "srg", 0.2, 0.1, 0.4, 0.01, 12, "better", 4)
    assert one.reversed() == Effect("b", "a", "srg", -0.2, -0.4, -0.1, 0.01, 12, "worse", 4)
    assert one.reversed().reversed() == one
    assert str(Effect("a", "b", "mine", 0.0, 0.0, 0.0, 1, 2, "cannot tell").reversed().difference) == "0.0"


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("claims: expected at least one Claim, got none", lambda: Contents("t", [], SCORES)),
        ("scores: expected the columns .* without ..variant", lambda: Contents("t", [CLAIM], SCORES[["image"]])),
        ("scores: expected a column image or key", lambda: Contents("t", [CLAIM], SCORES[["variant", "saco"]])),
        ("layers: expected the columns", lambda: Contents("t", [CLAIM], SCORES, layers=SCORES)),
        (r"paired\['x'\]: expected the columns", lambda: Contents("t", [CLAIM], SCORES, paired={"x": SCORES})),
        (
            r"variants: expected variants of the scores, \['gated', 'vanilla'\], got \['other'\]",
            lambda: Contents("t", [CLAIM], SCORES, variants=[Variant("other")]),
        ),
        ("variants: expected each name once", lambda: Contents("t", [CLAIM], SCORES, variants=[Variant("gated")] * 2)),
        ("role: expected one of", lambda: Variant("gated", "hero")),
        ("picture: expected uint8", lambda: ImageEntry("a", np.zeros((4, 4, 3)), {})),
        (
            "maps: expected the same",
            lambda: ImageEntry("a", np.zeros((4, 4, 3), np.uint8), {"a": np.zeros((2, 2)), "b": np.zeros((1, 2))}),
        ),
        (
            "evidence: expected as many patches",
            lambda: ImageEntry(
                "a", np.zeros((4, 4, 3), np.uint8), {"a": np.zeros((3, 3))}, evidence={2: PatchEvidence(**evidence())}
            ),
        ),
        (
            r"z: expected \[4\], one per patch, got \[3\]",
            lambda: PatchEvidence(**evidence() | {"z": np.zeros(3)}),
        ),
        (
            r"contributions: expected \[4, n\]",
            lambda: PatchEvidence(**evidence() | {"contributions": np.zeros((4, 3))}),
        ),
    ],
)
def test_what_is_wrong_is_named(message, make):
    with pytest.raises(ValueError, match=message):
        make()
