"""The training step from active features equals the dense one with autograd and torch's Adam."""

import pytest
import torch
import torch.nn.functional as F

import fastfg
from bench.train_sae import Dense
from fastfg.sae.topk_step import TopKStep
from tests.sae.test_train import sparse_data

ALIVE = 10_000


def made(k_aux=0, dead_after=200, dtype=torch.float64, d=24, n_features=96):
    W_dec = F.normalize(torch.randn(n_features, d, generator=torch.Generator().manual_seed(0)), dim=1)
    return TopKStep(W_dec.to(dtype), 5, k_aux, dead_after)


def batches(n, dtype=torch.float64, T=64):
    x, _ = sparse_data(T=n * T)
    return ((x - x.mean(0)) / 10).to(dtype).split(T)


@pytest.mark.parametrize("k_aux", [0, 4, 1000], ids=["none", "some of the dead", "all of the dead"])
def test_steps_equal_the_dense_ones(k_aux):
    ours = made(min(k_aux, 96))
    ours.b_enc[:30] = -2.0  # features that die
    dense = Dense(ours)
    dead = 0
    for x in batches(20):
        dead += int((ours.unused >= ours.dead_after).sum())
        loss, counts = ours.step(x, 1e-2)
        torch.testing.assert_close(loss.sum(), dense.step(x, 1e-2), rtol=1e-9, atol=1e-9)
        assert int(counts.sum()) <= 5 * len(x)
        for a, b in zip((*ours.weights, ours.b_dec), dense.weights, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-7, atol=1e-7)
        assert torch.equal(ours.unused, dense.unused)
    assert dead > 0


def test_losses_over_200_steps_in_float32():
    ours = made(4, dtype=torch.float32)
    dense = Dense(ours)
    for x in batches(200, torch.float32):
        assert float(ours.step(x, 1e-3)[0]) == pytest.approx(float(dense.step(x, 1e-3)), rel=1e-3)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(96), rtol=1e-5, atol=0)


def test_the_auxiliary_loss_moves_dead_features_alone():
    (x,) = batches(1)
    with_aux, without = made(4), made(0)
    for training in (with_aux, without):
        training.b_enc[:30] = -1e3  # never active, but among the dead with the largest pre-activations
        training.b_enc[:10] = -1.0
        training.unused[:10] = ALIVE
        training.step(x, 1e-2)
    moved = (with_aux.W_dec - without.W_dec).abs().amax(1)
    assert moved[:10].max() > 1e-3
    assert moved[10:].max() == 0


def test_no_dead_feature_is_no_auxiliary_loss():
    (x,) = batches(1)
    one, other = made(4), made(0)
    assert torch.equal(one.step(x, 1e-2)[0], other.step(x, 1e-2)[0])
    assert torch.equal(one.W_dec, other.W_dec)


def test_repeats_and_leaves_the_tokens():
    x = batches(1, torch.float32)[0]
    kept, results = x.clone(), []
    for _ in range(2):
        training = made(4, 1, torch.float32)
        for _ in range(3):
            training.step(x, 1e-3)
        results.append([*training.weights, training.b_dec, *training.m, *training.v])
    assert all(map(torch.equal, *results))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("k_aux", [0, 8])
def test_auxk_brings_dead_features_back(k_aux):
    """Thirty features have encoders so short that 66 others are always ahead of them."""
    training = made(k_aux)
    training.W_enc[:, :30] *= 0.05
    training.unused[:30] = training.dead_after
    back = torch.zeros(30, dtype=torch.bool)
    for x in batches(100):
        back |= training.step(x, 1e-2)[1][:30] > 0
    assert int(back.sum()) == 0 if k_aux == 0 else int(back.sum()) > 20


@pytest.mark.parametrize(("name", "value"), [("k_aux", -1), ("dead_after", 0)])
def test_wrong_options_are_named(name, value):
    x, _ = sparse_data(T=2000)
    with pytest.raises(ValueError, match=f"{name}: expected at least {int(name == 'dead_after')}, got {value}"):
        fastfg.train_sae(x, 64, 3, **{name: value})
