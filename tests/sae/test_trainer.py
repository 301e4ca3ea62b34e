"""A training that can be stopped anywhere and gets the same weights, and the controls that share everything with it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fastfg.sae.controls import COSINE, RowsAtLimit, at_limit, keep_rows_near
from fastfg.sae.recipe import KINDS, Recipe
from fastfg.sae.report import report
from fastfg.sae.trainer import SAETrainer, geometric_median

RECIPE = Recipe(n_features=64, k=6, steps=12, batch_size=128, lr=3e-3, k_aux=8, dead_after=300)


@pytest.fixture(scope="module")
def tokens():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 6, generator=random).relu() @ torch.randn(6, 16, generator=random)
    return 5 * x + torch.randn(16, generator=random)


def batch(tokens, step):
    return tokens[128 * step % 2048 :][:128]


def trained(tokens, recipe=RECIPE, steps=None):
    trainer = SAETrainer(recipe, tokens)
    while trainer.done < (recipe.steps if steps is None else steps):
        trainer.train(batch(tokens, trainer.done))
    return trainer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_resumed_training_has_the_same_bits(tokens, tmp_path, kind, stop):
    recipe = dataclasses.replace(RECIPE, kind=kind)
    expected = trained(tokens, recipe)
    trained(tokens, recipe, stop).save(tmp_path / "checkpoint", data="these")
    again = SAETrainer(recipe, tokens)
    again.resume(tmp_path / "checkpoint", data="these")
    assert again.done == stop
    while again.done < recipe.steps:
        again.train(batch(tokens, again.done))
    for name, tensor in expected._tensors().items():
        assert torch.equal(tensor, again._tensors()[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_of_something_else_is_refused(tokens, tmp_path):
    file = tmp_path / "checkpoint"
    trained(tokens, steps=2).save(file, data="these")
    for recipe, data, name in ((dataclasses.replace(RECIPE, lr=1e-3), "these", "recipe"), (RECIPE, "others", "data")):
        with pytest.raises(ValueError, match=f"^out: expected a checkpoint with {name} .*, got .* in {file}"):
            SAETrainer(recipe, tokens).resume(file, data=data)


def test_each_control_keeps_its_part(tokens):
    recipe = dataclasses.replace(RECIPE, steps=200, lr=2e-2)
    start = SAETrainer(recipe, tokens)
    found = {kind: trained(tokens, dataclasses.replace(recipe, kind=kind)) for kind in KINDS}
    assert torch.equal(found["frozen-decoder"].W_dec, start.W_dec)
    assert not torch.equal(found["frozen-decoder"].W_enc, start.W_enc)
    assert torch.equal(found["frozen-encoder"].W_enc, start.W_enc)
    assert not found["frozen-encoder"].b_enc.any()
    assert not torch.equal(found["frozen-encoder"].W_dec, start.W_dec)
    assert torch.equal(found["random"].W_dec, start.W_dec)
    assert F.cosine_similarity(found["random"].W_enc, start.W_enc, dim=0).min() > 0.9999
    for kind in ("trained", "soft-frozen"):
        cosines = F.cosine_similarity(found[kind].W_dec, start.W_dec)
        assert cosines.min() < 0.95
        assert kind == "trained" or cosines.min() > COSINE - 1e-5
    quality = {kind: report(trainer.finish(), tokens) for kind, trainer in found.items()}
    assert all(abs(one.l0 / quality["trained"].l0 - 1) < 0.05 for one in quality.values())
    assert quality["trained"].explained_variance == max(one.explained_variance for one in quality.values())
    assert quality["random"].explained_variance == min(one.explained_variance for one in quality.values())


def test_rows_are_moved_to_the_nearest_that_is_allowed():
    start, across = torch.tensor([[1.0, 0, 0]] * 3), torch.tensor([[0, 1.0, 0]] * 3)
    angles = torch.tensor([[0.1], [1.0], [3.0]])
    W = start * angles.cos() + across * angles.sin()
    near = W[0].clone()
    keep_rows_near(W, start)
    assert torch.equal(W[0], near)
    torch.testing.assert_close(W[1:], torch.tensor([[0.8, 0.6, 0], [0.8, 0.6, 0]]))
    assert at_limit(W, start).tolist() == [False, True, True]
    assert not at_limit(start, start).any()


def test_a_limit_that_no_row_reaches_changes_nothing(tokens):
    """So a short run of soft-frozen is no control."""
    start = SAETrainer(RECIPE, tokens).W_dec
    for steps, acts in ((12, False), (400, True)):
        recipe = dataclasses.replace(RECIPE, steps=steps, lr=2e-2 if acts else 3e-3)
        plain, soft = (trained(tokens, dataclasses.replace(recipe, kind=kind)) for kind in ("trained", "soft-frozen"))
        assert torch.equal(plain.W_dec, soft.W_dec) != acts
        assert bool(at_limit(soft.W_dec, start).any()) == acts


def test_a_row_that_left_the_limit_was_at_it(tmp_path):
    start, across = torch.eye(3)[:2], torch.eye(3)[1:]
    rows = RowsAtLimit(start, tmp_path / "limit.safetensors")
    held = 0.8 * start + 0.6 * across
    for W, share in ((start, 0.0), (torch.stack([held[0], start[1]]), 0.5), (start, 0.5)):
        rows.look(W)
        assert rows.share == share
    rows.save()
    again = RowsAtLimit(start, tmp_path / "limit.safetensors")
    again.look(torch.stack([start[0], held[1]]))
    assert (again.share, rows.share) == (1.0, 0.5)


def test_random_codes_are_fitted_by_least_squares(tokens):
    """No other scale and offset of the reconstructions is better, and the codes are those of the random encoder."""
    trainer = SAETrainer(dataclasses.replace(RECIPE, kind="random"), tokens)
    sae = trainer.finish()
    x = tokens.double()
    decoded = (sae(tokens) - sae.b_dec).double()
    least = (x - decoded - sae.b_dec.double()).square().sum()
    for scale, shift in ((1.01, 0), (0.99, 0), (1, 0.01)):
        assert (x - scale * decoded - sae.b_dec.double() - shift).square().sum() > least
    start = SAETrainer(RECIPE, tokens)
    codes = start.scaled(tokens) @ start.W_enc
    assert torch.equal((sae.encode(tokens) > 0).nonzero(), (codes >= codes.topk(6).values[:, -1:]).nonzero())


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(8, 2, steps=100, lr=1.0, warm_up=0.1)
    rates = [recipe.learning_rate(step) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2)


def test_the_geometric_median_ignores_a_few_far_tokens():
    x = torch.randn(1001, 3, generator=torch.Generator().manual_seed(0))
    x[:50] += 1000
    assert geometric_median(x).norm() < 0.2 < x.mean(0).norm()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k": 9}, ValueError, "k: expected 1 to n_features=8, got 9"),
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k: expected an int, got 2.0"),
        ({"lr": math.nan}, ValueError, "lr: expected a number > 0, got nan"),
        ({"warm_up": 1}, ValueError, "warm_up: expected a share from 0 to below 1, got 1"),
        ({"kind": "frozen"}, ValueError, "kind: expected one of .*, got 'frozen'"),
        ({"precision": "half"}, ValueError, "precision: expected one of .*, got 'half'"),
    ],
)
def test_wrong_recipes_are_named(given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Recipe(**{"n_features": 8, "k": 2, "steps": 3, **given})


def test_a_training_that_diverges_says_so(tokens):
    trainer = SAETrainer(dataclasses.replace(RECIPE, lr=1e30), tokens)
    for step in range(4):
        trainer.train(batch(tokens, step))
    with pytest.raises(ValueError, match="^lr: expected training to stay finite, .* lr=1e"):
        trainer.finish()


def test_tokens_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match="^first: expected tokens that differ, got 9 that are all the same"):
        SAETrainer(RECIPE, torch.ones(9, 4))
