"""One mapping of SAEs per gate: several SAEs are compared in one pass, with the maps of separate calls."""

from dataclasses import replace

import pytest
import torch

import fastfg
from tests.tools import random_sae

GATE = fastfg.Gate((1, 2), kappa=1.0, c_max=50.0)


@pytest.fixture
def others():
    return {1: random_sae(32, 60, "topk", k=5, seed=5), 2: random_sae(32, 60, "relu", seed=6)}


def test_the_maps_of_separate_calls(model, images, saes, others):
    gates = [
        (None, None),
        (GATE, saes),
        (GATE, others),
        (replace(GATE, layers=(2,), score="sae_error"), others),
        (replace(GATE, shuffle_seed=3), saes),
        (replace(GATE, score="gradient_x_residual"), None),
        (replace(GATE, blurred=True), others),
    ]
    found = fastfg.attribute(model, images, saes=[own for _, own in gates], gate=[gate for gate, _ in gates], target=1)
    for i, (gate, own) in enumerate(gates):
        alone = fastfg.attribute(model, images, saes=own, gate=gate, target=1)
        torch.testing.assert_close(found.maps[i], alone.maps, rtol=1e-12, atol=1e-14)
        for block, scores in alone.scores.items():
            torch.testing.assert_close(found.scores[block][i], scores, equal_nan=True)
            torch.testing.assert_close(found.gates[block][i], alone.gates[block])


def test_their_features(model, images, saes, others):
    found = fastfg.attribute(model, images, saes=[others, saes], gate=[GATE, GATE], target=1, features=3)
    for i, own in enumerate((others, saes)):
        alone = fastfg.attribute(model, images, saes=own, gate=GATE, target=1, features=3)
        for block in GATE.layers:
            assert torch.equal(found.features[block].indices[i], alone.features[block].indices)


def test_equal_mappings_share_one_run(model, images, saes, monkeypatch):
    from fastfg.attribution import relevancy_pass

    made = []
    own = relevancy_pass.PatchScores
    monkeypatch.setattr(relevancy_pass, "PatchScores", lambda *given: made.append(given) or own(*given))
    fastfg.attribute(model, images, saes=[dict(saes), saes, None], gate=[GATE, replace(GATE, kappa=0.5), None])
    assert len(made) == len(GATE.layers)


def test_no_images(model, images, saes, others):
    found = fastfg.attribute(model, images[:0], saes=[saes, others], gate=[GATE, GATE])
    assert found.maps.shape == (2, 0, 4, 6)


@pytest.mark.parametrize(
    ("gate", "n", "message"),
    [
        (GATE, 1, "or one such mapping for each gate, got a list of 1 for one gate"),
        ([GATE, None], 1, "or one such mapping for each gate, got 1 for 2 gates"),
        ([GATE], 2, "or one such mapping for each gate, got 2 for 1 gate"),
    ],
)
def test_one_for_each_gate(model, images, saes, gate, n, message):
    with pytest.raises(ValueError, match=message):
        fastfg.attribute(model, images, saes=[saes] * n, gate=gate)


def test_errors_name_the_gate(model, images, saes):
    with pytest.raises(
        ValueError, match=r"saes\[1\]: expected an SAE for each gated block \[1, 2\], got none for \[2\]"
    ):
        fastfg.attribute(model, images, saes=[saes, {1: saes[1]}], gate=[GATE, GATE])
    with pytest.raises(TypeError, match=r"saes\[0\]\[2\]: expected a SparseAutoencoder, got str"):
        fastfg.attribute(model, images, saes=[saes | {2: "b"}], gate=[GATE])
    with pytest.raises(TypeError, match=r"saes\[0\]: expected \{block: SparseAutoencoder\} or None, got int"):
        fastfg.attribute(model, images, saes=[3], gate=[GATE])
    narrow = {1: saes[1], 2: random_sae(16, 50, "relu")}
    with pytest.raises(ValueError, match=r"^saes\[1\]\[2\]: expected width 32, as the model's .*, got 16"):
        fastfg.attribute(model, images, saes=[saes, narrow], gate=[GATE, GATE])
    with pytest.raises(ValueError, match=r"^saes\[2\]: expected width 32, as the model's .*, got 16"):
        fastfg.attribute(model, images, saes=narrow, gate=[GATE, GATE])
    without = [None, replace(GATE, score="gradient_x_residual"), replace(GATE, layers=(1,))]  # no gate reads it
    fastfg.attribute(model, images, saes=[narrow] * 3, gate=without)
