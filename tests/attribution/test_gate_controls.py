"""Controls of the gate: permuted patches, a blurred vanilla map, lists of seeds, and the SAE's error as a score."""

import logging
from dataclasses import replace

import pytest
import torch

import fastfg
from fastfg.attribution import relevancy_pass
from fastfg.attribution.blurred import blur, blurred, correlation
from fastfg.types import SCORE_KINDS
from tests.tools import ACTIVATIONS, random_sae, record

SAE_KINDS = [(activation, normalize) for activation in ACTIVATIONS for normalize in ("none", "layer_norm")]


@pytest.mark.parametrize(("activation", "normalize"), SAE_KINDS)
def test_the_scores_add_up_to_gradient_x_residual(model, images, activation, normalize, monkeypatch):
    """combined + g . b_dec + sae_error = g . x; with normalisation, what is decoded has its token's scale and shift."""
    monkeypatch.setattr("fastfg.attribution.patch_scores.TOKENS_AT_ONCE", 7)
    sae = random_sae(32, 100, activation, normalize=normalize, **ACTIVATIONS[activation])
    kinds = ("combined", "sae_error", "gradient_x_residual")
    gates = [fastfg.Gate((1,), score=kind, rescale=kind == "combined") for kind in kinds]
    combined, error, whole = fastfg.attribute(model, images, saes={1: sae}, gate=gates).scores[1]
    _, _, _, _, x, g = record(model, images)
    x, g = x[1][:, 1:], g[1][:, 1:]
    like = sae.normalize(x)
    rest = (g * (sae.b_dec * like.scale + like.shift)).sum(-1)
    scale = float(whole.abs().max() + combined.abs().max())
    torch.testing.assert_close(combined + rest + error, whole, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(error, (g * (x - sae(x))).sum(-1), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_saes_error_in_low_precision(model, images, saes, dtype):
    gate = fastfg.Gate((1,), score="sae_error")
    exact = fastfg.attribute(model, images, saes=saes, gate=gate, target=1).scores[1]
    low = {block: sae.to(dtype) for block, sae in saes.items()}
    found = fastfg.attribute(model.float(), images.float(), saes=low, gate=gate, target=1).scores[1]
    assert torch.corrcoef(torch.stack([found.double().flatten(), exact.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("score", SCORE_KINDS)
def test_permuted_gates(model, images, saes, score):
    gate = fastfg.Gate((1, 2), kappa=1.0, c_max=50.0, score=score)
    plain, moved = (
        fastfg.attribute(model, images, saes=saes, gate=g, target=1) for g in (gate, replace(gate, permute_seed=4))
    )
    perm = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    for block in (1, 2):
        assert torch.equal(moved.gates[block], plain.gates[block][:, perm])
        assert torch.equal(moved.scores[block], plain.scores[block])
    assert not torch.equal(moved.maps, plain.maps)


def test_a_permuted_gate_by_hand(model, images, saes):
    """One gated block, the first: the map is the vanilla one where its columns are scaled by the permuted gates."""
    sae, gate = {0: saes[1]}, fastfg.Gate((0,), permute_seed=7)
    found = fastfg.attribute(model, images, saes=sae, gate=[None, replace(gate, permute_seed=None), gate])
    vanilla, plain, moved = found.maps.flatten(2)
    perm = torch.randperm(24, generator=torch.Generator().manual_seed(7))
    w = found.gates[0][1]
    flow = (plain - vanilla) / (w - 1)  # plain = before + flow * w, vanilla = before + flow
    known = w != 1  # the median patch of an image has gate 1, which says nothing of its flow
    assert known.sum() == 3 * 23
    expected = vanilla + flow * (w[:, perm] - 1)
    torch.testing.assert_close(moved[known], expected[known], rtol=1e-6, atol=1e-12)


def test_lists_of_seeds():
    gate = fastfg.Gate((1, 2), kappa=2.0)
    assert gate.shuffled([3, 5]) == {
        "shuffled 3": replace(gate, shuffle_seed=3),
        "shuffled 5": replace(gate, shuffle_seed=5),
    }
    assert gate.permuted(range(1), name="moved") == {"moved 0": replace(gate, permute_seed=0)}
    with pytest.raises(TypeError, match="seeds: expected integers"):
        gate.shuffled([0.5])
    for control in (gate.shuffled, gate.permuted):
        with pytest.raises(ValueError, match=r"seeds: expected each seed once, got \[1, 1\]"):
            control([1, 1])
    with pytest.raises(ValueError, match="shuffle_seed: expected None with score='gradient'"):
        replace(gate, score="gradient").shuffled([1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"permute_seed": 2**70}, ValueError, r"permute_seed: expected -2\*\*63 to 2\*\*64 - 1"),
        ({"permute_seed": 0.5}, TypeError, "permute_seed: expected integers"),
        ({"blurred": "yes"}, TypeError, "blurred: expected True or False, got 'yes'"),
        ({"score": "sae_error", "rescale": True}, ValueError, "rescale: expected False with score='sae_error'"),
        ({"score": "sae_error", "shuffle_seed": 1}, ValueError, "shuffle_seed: expected None with score='sae_error'"),
    ],
)
def test_gates_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        fastfg.Gate((1,), **options)


# Blurred -----------------------------------------------------------------------------------------------------------


def test_a_blur_by_hand():
    """Three patches in a row with a standard deviation of 1: weights 1, e^-0.5 and e^-2, each row summing to 1."""
    near, far = torch.exp(torch.tensor([-0.5, -2.0], dtype=torch.float64))
    maps = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    expected = torch.stack([1 / (1 + near + far), near / (1 + 2 * near), far / (1 + near + far)])
    torch.testing.assert_close(blur(maps, torch.ones(1).double())[0, 0], expected)
    assert torch.equal(blur(maps, torch.zeros(1).double()), maps)
    level = torch.full((1, 3, 4), 0.7, dtype=torch.float64)
    torch.testing.assert_close(blur(level, torch.full((1,), 9.0).double()), level)


def test_the_blur_changes_a_map_as_much_as_the_gate_does():
    random = torch.Generator().manual_seed(0)
    vanilla = torch.rand(4, 6, 5, generator=random, dtype=torch.float64)
    amount = torch.tensor([0.0, 0.05, 0.3, 1.0], dtype=torch.float64)[:, None, None]
    gated = 3 * (vanilla + amount * torch.rand(4, 6, 5, generator=random, dtype=torch.float64)) + 2
    found = blurred(vanilla, gated)
    torch.testing.assert_close(correlation(found, vanilla), correlation(gated, vanilla), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0], vanilla[0], rtol=0, atol=1e-6)
    alone = torch.cat([blurred(vanilla[i : i + 1], gated[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=0)


def test_blurs_without_meaning(caplog):
    vanilla = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    vanilla[1] = 0.5
    gated = torch.stack([torch.ones(4, 4), vanilla[0], -vanilla[2]])
    with caplog.at_level(logging.WARNING, "fastfg"):
        found = blurred(vanilla, gated)
    assert found[0].isnan().all()  # a constant gated map has no correlation
    assert torch.equal(found[1], vanilla[1])
    widest = blur(vanilla[2:].double(), torch.full((1,), 4.0).double())[0]
    torch.testing.assert_close(found[2], widest.float())
    assert caplog.messages == ["blurred: a gate changes 1 of 3 maps more than the widest blur does"]


def test_blurred_gates(model, images, saes):
    gate = fastfg.Gate((1, 2), kappa=1.0, c_max=3.0)
    control = replace(gate, blurred=True)
    together = fastfg.attribute(model, images, saes=saes, gate=[gate, control])
    vanilla = fastfg.attribute(model, images).maps
    assert together.maps.shape == (2, 3, 4, 6)
    torch.testing.assert_close(together.maps[1], blurred(vanilla, together.maps[0]), rtol=1e-9, atol=0)
    assert torch.equal(together.gates[1][0], together.gates[1][1])
    alone = fastfg.attribute(model, images, saes=saes, gate=control, features=2)
    torch.testing.assert_close(alone.maps, together.maps[1], rtol=1e-9, atol=0)
    assert alone.scores[1].shape == alone.gates[2].shape == (3, 24)
    assert alone.features[1].indices.shape == (3, 24, 2)
    with_vanilla = fastfg.attribute(model, images, saes=saes, gate=[control, None]).maps
    torch.testing.assert_close(with_vanilla[0], alone.maps, rtol=1e-9, atol=0)
    torch.testing.assert_close(with_vanilla[1], vanilla, rtol=1e-12, atol=0)


def test_a_score_of_rounding_is_said(model, images, caplog):
    """Block 3 of 4 reads the patches of block 2 through its LayerNorm alone."""
    relevancy_pass._warn_of_rounding.cache_clear()
    fastfg.attribute(model, images, gate=fastfg.Gate((1,), score="gradient_x_residual"))
    assert caplog.records == []
    for _ in range(2):
        fastfg.attribute(model, images, gate=fastfg.Gate((2,), score="gradient_x_residual"))
    (record,) = caplog.records
    assert "the score gradient_x_residual is 0 up to rounding at block 2" in record.message
