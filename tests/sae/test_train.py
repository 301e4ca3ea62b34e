"""Training finds a dictionary that is known, revives the dead, and reports honestly."""

import pytest
import torch

import fastfg
from fastfg.sae.train import _Training, report


def sparse_data(T=20000, d=24, F=48, k=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(F, d, generator=random), dim=1)
    codes = torch.zeros(T, F)
    active = torch.rand(T, F, generator=random).topk(k, dim=1).indices
    codes.scatter_(1, active, torch.rand(T, k, generator=random) + 0.5)
    return 10 * (codes @ W) + 5, W


def test_a_known_dictionary_is_found():
    x, W = sparse_data()
    sae, found = fastfg.train_sae(x, n_features=64, k=3, epochs=12)
    assert found.explained_variance > 0.9
    assert found.l0 <= 3
    assert found.tokens == 2000
    recovered = (torch.nn.functional.cosine_similarity(W[:, None], sae.W_dec[None], dim=-1).amax(1) > 0.95).double()
    assert recovered.mean() > 0.8
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=1e-5, atol=0)


def test_training_is_repeatable_and_leaves_its_input():
    x, _ = sparse_data(T=4000)
    kept = x.clone()
    steps = []
    first, a = fastfg.train_sae(x, 64, 3, epochs=1, seed=3, progress=lambda done, total: steps.append((done, total)))
    second, b = fastfg.train_sae(x, 64, 3, epochs=1, seed=3)
    assert torch.equal(first.W_enc, second.W_enc)
    assert a == b
    assert torch.equal(x, kept)
    assert steps == [(i + 1, 7) for i in range(7)]


def test_dead_features_are_revived():
    x, _ = sparse_data(T=4000)
    training = _Training(x, 64, 3, 1e-3, seed=0)
    with torch.no_grad():
        training.b_enc[:20] = -1e6  # twenty features that never fire
    batches = list(training.batches(2, 500))
    for tokens in batches[:8]:
        training.step(tokens, 0.5)
    dead = (~training.fired).nonzero().flatten()
    assert set(range(20)) <= set(dead.tolist())
    training.revive(batches[8])
    assert training.revived == len(dead)
    assert training.b_enc[dead].eq(0).all()
    for tokens in batches[9:]:
        training.step(tokens, 0.5)
    assert training.fired[:20].double().mean() > 0.7


def test_report_by_hand():
    eye = torch.eye(2)
    sae = fastfg.SparseAutoencoder(eye, torch.zeros(2), eye, torch.zeros(2), "relu")
    x = torch.tensor([[1.0, -1.0], [3.0, -1.0]])  # the second column is lost; it does not vary
    found = report(sae, x)
    assert found.explained_variance == pytest.approx(1 - 2 / 2)
    assert found.dead_share == 0.5
    assert found.l0 == 1.0


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(10), {}, r"x: expected floating tokens \[T, d\], got torch.float32 \[10\]"),
        (torch.full((4000, 4), torch.nan), {}, "x: expected finite tokens"),
        (torch.zeros(4000, 4), {"k": 65}, "k: expected 1 to n_features=64, got 65"),
        (torch.zeros(4000, 4), {"held_out": 0}, "held_out: expected a share between 0 and 1, got 0"),
        (torch.zeros(100, 4), {}, "x: expected at least one batch of 512 training tokens, got 100 in all"),
    ],
)
def test_what_does_not_fit_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        fastfg.train_sae(x, **({"n_features": 64, "k": 3} | options))
