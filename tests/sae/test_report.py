"""sae_report, and the warning of attribute about an SAE that does not fit."""

import logging
import math

import pytest
import torch

import fastfg
from fastfg.attribution.sae_report import warn_of_poor_fit
from tests.tools import random_sae, tiny_vit


def identity_sae(d, normalize="none", scale=1.0):
    eye = torch.eye(d, dtype=torch.float64)
    W_enc = torch.cat([eye, -eye], 1)
    return fastfg.SparseAutoencoder(
        W_enc, torch.zeros(2 * d).double(), scale * W_enc.T, torch.zeros(d).double(), "relu", normalize=normalize
    )


def test_report_by_hand():
    """Two tokens, (2, 0) and (0, 4): x_hat is half of x, so the error is 1/4 of 20, and the variance is 10."""
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    found = fastfg.sae_report(identity_sae(2, scale=0.5), x)
    assert found.explained_variance == pytest.approx(1 - 5 / 10)
    assert found.explained_variance_normalized == found.explained_variance
    assert found.l0 == 1
    assert found.dead_share == 0.5
    assert found.norm_ratio == pytest.approx(0.5)
    assert found.tokens == 2


def test_report_in_the_normalised_space():
    x = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sae = random_sae(16, 40, "topk", k=5, normalize="layer_norm")
    values = sae.normalize(x).values
    decoded = sae.decode(sae.encode(x))
    expected = 1 - (values - decoded).square().sum() / (values - values.mean(0)).square().sum()
    assert fastfg.sae_report(sae, x).explained_variance_normalized == pytest.approx(float(expected))
    expected = 1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fastfg.sae_report(sae, x[None]).explained_variance == pytest.approx(float(expected))


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_explained_variance_of_tokens_that_normalise_to_the_same(normalize, dtype):
    """Their variance there is rounding: the share would be -1e13, or any number."""
    x = torch.linspace(1, 5, 40)[:, None] * (torch.randn(16, generator=torch.Generator().manual_seed(0)) * 100)
    found = fastfg.sae_report(random_sae(16, 40, "topk", k=5, normalize=normalize).to(dtype), x)
    assert math.isnan(found.explained_variance_normalized)
    assert math.isfinite(found.explained_variance)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(0, 16), {}, "x: expected tokens that differ to report on, got 0"),
        (torch.zeros(2, 0, 16), {}, "x: expected tokens that differ to report on, got 0"),
        (torch.ones(1, 16), {}, "x: expected tokens that differ to report on, got 1"),
        (torch.ones(9, 16), {}, "x: expected tokens that differ to report on, got 9"),
        (torch.eye(16) * torch.nan, {}, "tokens: expected finite numbers, got NaN or infinity"),
        (torch.eye(16, dtype=torch.float64) * 1e-200, {}, "x: expected tokens whose variance is not 0 in float64"),
        (torch.eye(16) * 1e5, {"dtype": torch.float16}, r"sae: expected finite codes .* in torch.float16"),
        (torch.cat([torch.eye(16), torch.zeros(1, 16)]), {"normalize": "constant_norm"}, "sae: .* a token of zeros"),
    ],
)  # fmt: skip
def test_tokens_that_have_no_report(tokens, options, message):
    sae = random_sae(16, 40, "relu", **options)
    with pytest.raises(ValueError, match=message):
        fastfg.sae_report(sae, tokens)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
def test_report_on_an_sae_in_half_precision(dtype, normalize, magnitude):
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)) * magnitude
    sae = random_sae(16, 40, "relu", normalize=normalize).to(dtype)
    found = vars(fastfg.sae_report(sae, x))
    expected = vars(fastfg.sae_report(sae.double(), x))
    for name in ("explained_variance", "explained_variance_normalized", "norm_ratio", "l0", "dead_share"):
        assert found[name] == pytest.approx(expected[name], rel=0.01, abs=0.01)


def test_negative_codes_are_active():
    x = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sae = random_sae(16, 40, "topk", k=40, post="none")
    assert fastfg.sae_report(sae, x).l0 == 40
    assert fastfg.sae_report(sae, x).dead_share == 0


def test_report_from_images():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    sae = random_sae(32, 100, "topk", k=9)
    tokens = fastfg.residuals(model, images, layers=1)[1]
    assert fastfg.sae_report(sae, model=model, images=images, layer=1) == fastfg.sae_report(sae, tokens)
    sae.provenance["layer"] = 1
    assert fastfg.sae_report(sae, model=model, images=images) == fastfg.sae_report(sae, tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tokens: expected tokens, or model and images, got neither"),
        ({"tokens": torch.zeros(3, 31)}, "tokens: expected width 32, as the SAE has, got 31"),
        ({"tokens": torch.zeros(3)}, r"tokens: expected floating \[T, 32\] .* got \[3\]"),
        ({"tokens": torch.zeros(3, 32).long()}, "tokens: expected floating"),
        ({"tokens": torch.zeros(3, 32), "layer": 1}, "tokens: expected either tokens, or model, images and layer"),
        ({"model": 1, "images": 1}, "layer: expected the block that the SAE belongs to, got None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastfg.sae_report(random_sae(32, 100, "topk", k=9), **arguments)
    with pytest.raises(TypeError, match="sae: expected a SparseAutoencoder, got int"):
        fastfg.sae_report(3, **arguments)


def test_attribute_warns_once_of_an_sae_that_does_not_fit(caplog):
    model, images = tiny_vit(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    poor, good = random_sae(32, 100, "topk", k=9), identity_sae(32)
    gate = fastfg.Gate((1, 2))
    with caplog.at_level(logging.WARNING, logger="fastfg"):
        fastfg.attribute(model, images[:0], saes={1: poor, 2: good}, gate=gate)  # blank images say nothing
        assert not caplog.records
        for _ in range(2):
            fastfg.attribute(model, images, saes={1: poor, 2: good}, gate=gate)
    (record,) = caplog.records
    assert "saes[1]: it explains -" in record.getMessage()
    assert "less than 0.5" in record.getMessage()


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_attribute_does_not_warn_of_a_control(caplog, kind):
    model, images = tiny_vit(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    control = random_sae(32, 100, "topk", k=9)
    control.provenance["recipe"] = {"kind": kind}
    foreign = identity_sae(32)
    foreign.provenance["recipe"] = "from elsewhere"
    with caplog.at_level(logging.WARNING, logger="fastfg"):
        fastfg.attribute(model, images, saes={1: control, 2: foreign}, gate=fastfg.Gate((1, 2)))
    assert [record.getMessage()[:9] for record in caplog.records] == (["saes[1]: "] if kind == "trained" else [])


def test_the_tokens_it_looks_at_are_of_all_images_and_places(caplog):
    x = torch.randn(64, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    corner, dims = torch.arange(16) == 0, torch.arange(32) == 31
    x *= (corner[:, None] == dims)[None]  # the first patch of each image has a direction of its own
    fits_the_rest, fits_the_corner = identity_sae(32), identity_sae(32)
    fits_the_rest.W_dec[:, 31] = 0
    fits_the_corner.W_dec[:, :31] = 0
    with caplog.at_level(logging.WARNING, logger="fastfg"):
        warn_of_poor_fit(fits_the_rest, x, 0)
        assert not caplog.records
        warn_of_poor_fit(fits_the_corner, x, 1)
    (record,) = caplog.records
    assert "saes[1]: it explains" in record.getMessage()


def test_an_sae_that_overflows_does_not_fit(caplog):
    sae = identity_sae(32).half()
    sae.W_dec.mul_(6e4)
    with caplog.at_level(logging.WARNING, logger="fastfg"):
        warn_of_poor_fit(sae, torch.randn(2, 40, 32).half() * 100, 3)
        warn_of_poor_fit(identity_sae(32), torch.zeros(2, 40, 32), 4)  # a blank batch says nothing
    (record,) = caplog.records
    assert "saes[3]: it explains -inf of the variance" in record.getMessage()
