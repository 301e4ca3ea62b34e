"""Training finds a known dictionary, revives dead features, and its report is right on tokens of any dtype."""

from contextlib import contextmanager

import pytest
import torch

import fastfg
from fastfg.sae.report import report
from fastfg.sae.train import _Training
from tests.tools import random_sae


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


def test_batch_topk_with_prefixes():
    x, _ = sparse_data(T=4000)
    sae, found = fastfg.train_sae(x, 64, 3, epochs=2, activation="batch_topk", prefixes=(0.25, 1))
    assert sae.activation_name == "batch_topk"
    assert found.l0 == pytest.approx(3, rel=0.1)
    assert found.explained_variance > 0.3
    with pytest.raises(ValueError, match="^activation: expected one of .*, got 'gated'"):
        fastfg.train_sae(x, 64, 3, activation="gated")
    with pytest.raises(ValueError, match="^prefixes: expected increasing shares of the 64 features"):
        fastfg.train_sae(x, 64, 3, prefixes=(0.25,))


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
    training.b_enc[:20] = -1e6  # twenty features that never fire
    batches = list(training.batches(2, 500))
    for tokens in batches[:8]:
        training.scheduled_step(tokens, 0.5)
    dead = (~training.fired).nonzero().flatten()
    assert set(range(20)) <= set(dead.tolist())
    training.revive(batches[8])
    assert training.revived == len(dead)
    assert training.b_enc[dead].eq(0).all()
    for tokens in batches[9:]:
        training.scheduled_step(tokens, 0.5)
    assert training.fired[:20].double().mean() > 0.7


def test_report_by_hand():
    eye = torch.eye(2)
    sae = fastfg.SparseAutoencoder(eye, torch.zeros(2), eye, torch.zeros(2), "relu")
    x = torch.tensor([[1.0, -1.0], [3.0, -1.0]])  # the second column is lost; it does not vary
    found = report(sae, x)
    assert found.explained_variance == pytest.approx(1 - 2 / 2)
    assert found.dead_share == 0.5
    assert found.l0 == 1.0


def small():
    x, _ = sparse_data(T=3000)
    return x, {"n_features": 64, "k": 3, "epochs": 1, "seed": 3}


@pytest.fixture(scope="module")
def expected():
    x, options = small()
    return fastfg.train_sae(x, **options)


@contextmanager
def default(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64 default": lambda: default(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: default(lambda: None, torch.set_default_device, "meta"),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_callers_context_changes_nothing(around, expected):
    x, options = small()
    with AROUND[around]():
        sae, found = fastfg.train_sae(x.clone(), **options)
    assert found == expected[1]
    for name, tensor in expected[0].state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor)
        assert not sae.state_dict()[name].is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_other_dtypes(dtype, expected):
    x, options = small()
    _, found = fastfg.train_sae(x.to(dtype), **options)
    assert found.explained_variance == pytest.approx(expected[1].explained_variance, abs=0.02)


def test_report_of_half_precision_tokens_whose_squares_overflow():
    """The squares of 400 overflow in float16: the report said 1.0 of any SAE."""
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 400
    sae = random_sae(8, 32, "topk", k=2, dtype=torch.float32)
    wide = report(sae, x.half().double())
    assert report(sae, x.half()).explained_variance == pytest.approx(wide.explained_variance, rel=1e-5)
    assert wide.explained_variance < 0.9


def test_report_of_tokens_that_are_all_the_same():
    sae = random_sae(8, 32, "topk", k=2, dtype=torch.float32)
    for x in (torch.full((5, 8), 0.1), torch.zeros(1, 8), torch.zeros(0, 8)):
        with pytest.raises(ValueError, match=f"x: expected tokens that differ to report on, got {len(x)}"):
            report(sae, x)


def test_reviving_from_tokens_without_an_error():
    training = _Training(sparse_data(T=1000)[0], 64, 3, 1e-3, seed=0)
    training.revive(torch.zeros(10, 24))
    assert training.revived == 0


def test_tokens_that_require_gradients(expected, recwarn):
    x, options = small()
    found = fastfg.train_sae(x.requires_grad_(), **options)
    assert found[1] == expected[1]
    assert not recwarn.list


def test_training_that_diverges_is_named():
    x, options = small()
    with pytest.raises(RuntimeError, match="lr: expected training to stay finite, .* with lr=1e\\+30"):
        fastfg.train_sae(x, **options, lr=1e30)


TOKENS = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(10), {}, ValueError, r"x: expected floating tokens \[T, d\], got torch.float32 \[10\]"),
        (torch.zeros(10, 4).int(), {}, ValueError, r"x: expected floating tokens \[T, d\], got torch.int32 \[10, 4\]"),
        (torch.zeros(4000, 0), {}, ValueError, r"x: expected floating tokens \[T, d\], got torch.float32 \[4000, 0\]"),
        (TOKENS.numpy(), {}, ValueError, r"x: expected floating tokens \[T, d\], got ndarray"),
        (torch.full((4000, 4), torch.nan), {}, ValueError, "x: expected finite tokens"),
        (TOKENS.double() * 1e30, {}, ValueError, r"x: expected values up to 1e\+15, whose squares fit float32"),
        (torch.full((4000, 4), 0.1), {}, ValueError, "x: expected training tokens that differ, got 3600 that are all"),
        (
            torch.cat([TOKENS[:3600], torch.ones(400, 4)]),
            {},
            ValueError,
            "x: expected held-out tokens that differ, got 400",
        ),
        (TOKENS[:2], {}, ValueError, "x: expected at least one batch of 512 training tokens, got 2 in all"),
        (TOKENS[:2], {"batch_size": 1}, ValueError, "held_out: expected a share that keeps at least 2 of the 2 tokens"),
        (
            TOKENS,
            {"held_out": 1e-6},
            ValueError,
            "held_out: .* at least 2 of the 4000 tokens, got 1e-06, which keeps 0",
        ),
        (TOKENS, {"held_out": 0}, ValueError, "held_out: expected a share between 0 and 1, got 0"),
        (TOKENS, {"held_out": "a"}, ValueError, "held_out: expected a share between 0 and 1, got 'a'"),
        (TOKENS, {"k": 65}, ValueError, "k: expected 1 to n_features=64, got 65"),
        (TOKENS, {"k": 0}, ValueError, "k: expected at least 1, got 0"),
        (TOKENS, {"k": 2.0}, TypeError, "k: expected an int, got 2.0"),
        (TOKENS, {"n_features": 0}, ValueError, "n_features: expected at least 1, got 0"),
        (TOKENS, {"n_features": True}, TypeError, "n_features: expected an int, got True"),
        (TOKENS, {"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        (TOKENS, {"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        (TOKENS, {"batch_size": -1}, ValueError, "batch_size: expected at least 1, got -1"),
        (TOKENS, {"revivals": -1}, ValueError, "revivals: expected at least 0, got -1"),
        (TOKENS, {"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
        (TOKENS, {"seed": 2**70}, ValueError, r"seed: expected -2\*\*63 to 2\*\*64 - 1, got 1180591"),
        (TOKENS * 1e-25, {}, ValueError, "x: expected tokens that deviate from their mean by 1e-18 or more, got"),
        (
            TOKENS.double() * 1e-40,
            {},
            ValueError,
            "x: expected tokens that deviate from their mean by 1e-18 or more, got",
        ),
        (
            TOKENS.double() + 1e9,
            {},
            ValueError,
            "x: expected tokens whose deviation from their mean .* fits float32, got",
        ),
        (TOKENS, {"lr": True}, ValueError, "lr: expected a number > 0, got True"),
        (TOKENS, {"lr": 0}, ValueError, "lr: expected a number > 0, got 0"),
        (TOKENS, {"lr": float("nan")}, ValueError, "lr: expected a number > 0, got nan"),
    ],
)
def test_wrong_arguments_are_named(x, options, error, message):
    with pytest.raises(error, match=message):
        fastfg.train_sae(x, **({"n_features": 64, "k": 3} | options))
