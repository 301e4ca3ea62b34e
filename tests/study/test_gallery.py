"""Which maps the gallery of a study shows."""

from types import SimpleNamespace

import pandas as pd

from fastfg.study.claim import GATE, SHUFFLED, VANILLA
from fastfg.study.gallery import with_maps


def shown(gains, controls, shuffled=()):
    """By {variant: how far the gate is ahead of it}."""
    rows = [{"variant": name, "difference": -gain} for name, gain in gains.items()]
    outcome = SimpleNamespace(controls=list(controls), shuffled=list(shuffled))
    return with_maps(outcome, SimpleNamespace(against_gate=pd.DataFrame(rows)))


def test_the_strongest_control_and_the_first_shuffled_decoder_are_beside_the_gate():
    gains = {VANILLA: 0.0, "random": 0.3, "centre": 0.1, SHUFFLED: 0.01}
    found = shown(gains, ["random", "centre"], ["shuffled 7", "shuffled 8"])
    assert found == [VANILLA, GATE, "centre", "shuffled 7"]


def test_a_control_without_scores_is_not_the_strongest():
    assert shown({VANILLA: 0.1, "random": 0.3, "centre": float("nan")}, ["random", "centre"]) == [
        VANILLA,
        GATE,
        "random",
    ]
    assert shown({VANILLA: 0.1, "centre": float("nan")}, ["centre"]) == [VANILLA, GATE]
    assert shown({VANILLA: 0.1}, []) == [VANILLA, GATE]
