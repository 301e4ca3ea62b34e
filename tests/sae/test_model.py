"""SparseAutoencoder: sparse codes, reconstruction, and refused arguments."""

import copy

import pytest
import torch

import fastfg
from fastfg.sae import model
from tests.tools import ACTIVATIONS, random_sae


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sparse_codes_are_the_dense_ones(activation):
    sae = random_sae(32, 100, activation, normalize="layer_norm", **ACTIVATIONS[activation])
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    f = sae.encode(x)
    values, indices = sae.encode_sparse(x)
    assert values.shape == indices.shape == (2, 5, 9 if activation == "topk" else int((f > 0).sum(-1).max()))
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(torch.zeros_like(f).scatter_add_(-1, indices, values), f)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_of_nan_has_codes_of_nan(activation):
    sae = random_sae(32, 100, activation, **ACTIVATIONS[activation])
    x = torch.randn(3, 32, dtype=torch.float64)
    x[1, 4] = torch.nan
    values, _ = sae.encode_sparse(x)
    assert values.isnan().any(1).tolist() == [False, True, False]
    assert sae.encode_sparse(x[1:2])[0].isnan().any()


MAGNITUDES = {torch.float16: (1e-6, 1e-3, 1.0, 1e4), torch.bfloat16: (1e-6, 1.0, 1e15)}


@pytest.mark.parametrize(("dtype", "magnitude"), [(d, m) for d, many in MAGNITUDES.items() for m in many])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm", "input_scale"])
def test_an_sae_in_half_precision_normalises_in_float32(dtype, magnitude, normalize):
    """Residuals of 1e-6, the square of 1e4 and the 1e-5 of a layer norm are beyond what float16 holds."""
    mean = torch.ones(32, dtype=torch.float64) * magnitude
    scaled = {"input_mean": mean, "input_scale": 3 * min(magnitude, 1e3)}
    sae = random_sae(32, 100, "relu", **(scaled if normalize == "input_scale" else {"normalize": normalize}))
    half, x = copy.deepcopy(sae).to(dtype), torch.randn(7, 32, dtype=torch.float64).float() * magnitude
    sae = copy.deepcopy(half).double()  # with the same rounding of the weights
    found, expected = half.normalize(x), sae.normalize(x.double())
    assert found.values.dtype == dtype
    close(found.values, expected.values, 0.6 * torch.finfo(dtype).eps)
    close(found.scale, expected.scale, 1e-6)
    close(found.shift, expected.shift, 1e-6)
    close(half(x), sae(x.double()), 4 * torch.finfo(dtype).eps)
    assert (half(x).dtype, half(x.to(dtype)).dtype) == (torch.float32, dtype)


def close(found, expected, share):
    assert float((found.double() - expected).abs().max()) <= share * float(expected.abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sparse_codes_of_many_tokens_come_in_chunks(activation, monkeypatch):
    sae = random_sae(32, 100, activation, **ACTIVATIONS[activation])
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    x[1] *= 3  # chunks differ in how many features are active
    whole, encoded = sae.encode_sparse(x), []
    monkeypatch.setattr(model, "TOKENS_AT_ONCE", 3)
    plain = model.encode
    monkeypatch.setattr(model, "encode", lambda x, *given: encoded.append(len(x)) or plain(x, *given))
    for found, expected in zip(sae.encode_sparse(x), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(n <= 3 for n in encoded)


def test_no_tokens_and_no_active_feature():
    sae = random_sae(32, 100, "relu")
    sae.b_enc.fill_(-1e9)
    values, indices = sae.encode_sparse(torch.randn(3, 32, dtype=torch.float64))
    assert values.shape == indices.shape == (3, 0)
    assert random_sae(32, 100, "topk", k=3).encode_sparse(torch.empty(0, 32).double())[0].shape == (0, 3)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
def test_reconstruction_comes_back_at_its_own_scale(normalize):
    d = 16
    eye = torch.eye(d, dtype=torch.float64)
    W_enc = torch.cat([eye, -eye], 1)  # a relu SAE that is the identity
    sae = fastfg.SparseAutoencoder(
        W_enc, torch.zeros(2 * d).double(), W_enc.T, torch.randn(d).double(), "relu", normalize=normalize
    )
    x = torch.randn(4, d, dtype=torch.float64) * 3 + 1
    torch.testing.assert_close(sae(x), x, rtol=1e-4, atol=1e-4)


def test_it_moves_and_has_no_gradients():
    sae = random_sae(32, 100, "relu").to(torch.float32)
    assert sae.W_enc.dtype == torch.float32
    assert not any(t.requires_grad for t in sae.state_dict().values())
    assert "F=100, relu" in repr(sae)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": torch.zeros(5)}, r"W_enc: expected \[d, F\], got \[5\]"),
        ({"b_enc": torch.zeros(3)}, r"b_enc: expected \[6\] for W_enc \[4, 6\], got \[3\]"),
        ({"W_dec": torch.zeros(4, 6)}, r"W_dec: expected \[6, 4\] .* got \[4, 6\]"),
        ({"b_dec": torch.zeros(6)}, r"b_dec: expected \[4\]"),
        ({"k": None}, "k: expected 1 to 6 for a topk SAE, got None"),
        ({"k": 7}, "k: expected 1 to 6 for a topk SAE, got 7"),
        ({"k": 2.0}, "k: expected an int, got 2.0"),
        ({"k": True}, "k: expected an int, got True"),
        ({"subtract_b_dec": "false"}, "subtract_b_dec: expected True or False, got 'false'"),
        ({"b_dec": [0.0] * 4}, "b_dec: expected a tensor, got list"),
        ({"W_enc": torch.zeros(4, 6).long()}, "W_enc: expected a floating dtype, got torch.int64"),
        ({"b_dec": torch.zeros(4).half()}, "b_dec: expected torch.float32 on cpu, as W_enc, got torch.float16 on cpu"),
        ({"b_enc": torch.zeros(6, device="meta")}, "b_enc: expected torch.float32 on cpu, as W_enc, .* on meta"),
        ({"activation": "elu"}, "activation: expected one of .* got 'elu'"),
        ({"normalize": "batch"}, "normalize: expected one of .* got 'batch'"),
        ({"activation": "relu"}, "k: expected None for a relu SAE, got 2"),
        ({"activation": "batch_topk", "threshold": True}, "threshold: expected a tensor or a number, got True"),
        ({"b_enc": torch.zeros(6).to_sparse()}, "b_enc: expected a dense tensor of float16, .*sparse_coo"),
        ({"W_enc": torch.zeros(4, 6).to(torch.float8_e4m3fn)}, "W_enc: expected a dense tensor of float16, .*float8"),
        ({"W_dec": torch.full((6, 4), torch.nan)}, "W_dec: expected finite weights, got NaN or infinity"),
        ({"activation": "jumprelu"}, "threshold: expected a tensor for a jumprelu SAE, got None"),
        ({"activation": "jumprelu", "threshold": 0.5}, r"threshold: expected \[6\] for a jumprelu SAE, got \[\]"),
        (
            {"activation": "gated", "r_mag": torch.zeros(6), "b_gate": torch.zeros(6)},
            "b_mag: expected a tensor for a gated SAE",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    fits = {
        "W_enc": torch.zeros(4, 6),
        "b_enc": torch.zeros(6),
        "W_dec": torch.zeros(6, 4),
        "b_dec": torch.zeros(4),
        "k": 2,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        fastfg.SparseAutoencoder(**(fits | change))


def test_input_of_another_width():
    with pytest.raises(ValueError, match=r"x: expected \[..., 32\] for this SAE, got \[3, 31\]"):
        random_sae(32, 100, "relu").encode(torch.zeros(3, 31))
