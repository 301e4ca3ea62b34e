"""Gates with SAEs whose codes may be negative, and with the other variants that public formats need.

``s = sum_k f_k (D_k . g)`` holds for codes of any sign. The score ``activation`` sums the codes' magnitudes.
"""

import pytest
import torch

import fastfg
from fastfg import ops, reference
from fastfg.attribution.patch_scores import PatchScores
from fastfg.ops.dispatch import BackendError
from tests.tools import dense_score, oracle, random_sae, tiny_vit

GENERATOR = torch.Generator().manual_seed(3)
VARIANTS = {
    "signed": ("topk", {"k": 90, "post": "none"}),
    "by magnitude": ("topk", {"k": 9, "post": "none", "ranking": "magnitude"}),
    "groupmax": ("groupmax", {"k": 20}),
    "batch_topk >=": ("batch_topk", {"threshold": 0.5, "strict": False}),
    "jumprelu >=": ("jumprelu", {"threshold": torch.rand(100, generator=GENERATOR).double(), "strict": False}),
    "input mean and scale": (
        "topk",
        {"k": 90, "post": "none", "input_mean": torch.randn(32, generator=GENERATOR).double(), "input_scale": 2.5},
    ),
    "input scale under layer norm": ("topk", {"k": 9, "input_scale": 2.5, "normalize": "layer_norm"}),
}
KINDS = ("combined", "activation", "gradient", "gradient_signed", "sae_error")
SIGNED = [name for name, (_, options) in VARIANTS.items() if options.get("post") == "none"]


def sae_of(name, **options):
    activation, own = VARIANTS[name]
    return random_sae(32, 100, activation, **(own | options))


def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 24, 32, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_by_their_definition(name):
    sae, (x, g) = sae_of(name), tokens()
    source = PatchScores(x, g, sae)
    for kind in KINDS[:-1]:
        for options in ({}, {"rescale": True}, {"shuffle_seed": 5} if kind == "combined" else {}):
            gate = fastfg.Gate((1,), score=kind, **options)
            torch.testing.assert_close(source.score(gate), dense_score(gate, sae, x, g))
    left_out = (g * (x - sae(x))).sum(-1)
    torch.testing.assert_close(source.score(fastfg.Gate((1,), score="sae_error")), left_out)


@pytest.mark.parametrize("name", SIGNED)
def test_negative_codes(name):
    """Some codes are negative; one token and one feature at a time; and the parts add up to g . x."""
    sae, (x, g) = sae_of(name), tokens()
    f = sae.encode(x)
    assert (f < 0).any()
    source = PatchScores(x, g, sae)
    combined = source.score(fastfg.Gate((1,)))
    activation = source.score(fastfg.Gate((1,), score="activation"))
    for b, t in ((0, 0), (1, 7)):
        by_hand = sum(float(f[b, t, k]) * float(sae.W_dec[k] @ g[b, t]) for k in range(100))
        assert float(combined[b, t]) == pytest.approx(by_hand)
        assert float(activation[b, t]) == pytest.approx(sum(abs(float(v)) for v in f[b, t]))
    scale = 1.0 if sae.input_scale is None else float(sae.input_scale)
    mean = torch.zeros(32).double() if sae.input_mean is None else sae.input_mean
    error = source.score(fastfg.Gate((1,), score="sae_error"))
    whole = combined * scale + g @ (sae.b_dec * scale + mean) + error
    torch.testing.assert_close(whole, (g * x).sum(-1))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_strongest_features(name):
    """The features of largest absolute contribution, also of negative codes; the rest is padded."""
    sae, (x, g) = sae_of(name), tokens()
    contributions = sae.encode(x) * (g @ sae.W_dec.T)
    found = PatchScores(x, g, sae).features(fastfg.Gate((1,)), 5)
    best = contributions.abs().topk(5)
    torch.testing.assert_close(found.values.abs(), best.values)
    torch.testing.assert_close(contributions.gather(-1, found.indices.clamp(min=0)), found.values)


@pytest.mark.parametrize("name", VARIANTS)
def test_maps(name):
    model, images = tiny_vit(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    saes, gate = {1: sae_of(name)}, fastfg.Gate((1,), kappa=1.0, c_max=20.0)
    found = fastfg.attribute(model, images, saes=saes, gate=gate)
    torch.testing.assert_close(found.maps.flatten(1), oracle(model, images, gate, saes))


def test_a_named_backend_says_that_it_does_not_have_a_variant():
    x, g = (t.flatten(0, 1) for t in tokens())
    for name in ("signed", "by magnitude", "groupmax"):
        with pytest.raises(BackendError, match="'cpp' can't run encode_topk: only the reference has groups="):
            PatchScores(x[None], g[None], sae_of(name), "cpp").codes  # noqa: B018
    with pytest.raises(BackendError, match="'cpp' can't run encode_project: only the reference has thresholds that"):
        PatchScores(x[None], g[None], sae_of("jumprelu >="), "cpp").score(fastfg.Gate((1,)))
    W_enc, b_enc = torch.zeros(32, 10).double(), torch.zeros(10).double()
    for options, message in (
        ({"post": "elu"}, "post: expected one of .* got 'elu'"),
        ({"ranking": "size"}, "ranking: expected one of .* got 'size'"),
        ({"groups": True}, "groups: expected k=3 to divide F=10"),
        ({"post": "none", "backend": "cuda"}, "backend: expected 'auto' or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.encode_topk(x, W_enc, b_enc, None, 3, **options)


def test_ties_zeros_and_exact_thresholds():
    """Equal magnitudes: the lowest index. Runs that are all negative: a code of 0. A threshold that is met."""
    eye, b = torch.eye(4), torch.zeros(4)
    x = torch.tensor([[2.0, -2.0, 1.0, -1.0], [-3.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    values, indices = ops.encode_topk(x, eye, b, None, 3, post="none", ranking="magnitude")
    assert values.tolist() == [[2, -2, 1], [-3, -1, 0], [0, 0, 0]]
    assert indices.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    values, indices = ops.encode_topk(x, eye, b, None, 2, groups=True)
    assert values.tolist() == [[2, 1], [0, 0], [0, 0]]
    assert indices.tolist() == [[0, 2], [1, 2], [0, 2]]
    pre = torch.tensor([0.5, 0.4, -1.0])
    for strict, expected in ((True, [0.0, 0.0, 0.0]), (False, [0.5, 0.0, 0.0])):
        activation = reference.Activation("batch_topk", threshold=torch.tensor(0.5), strict=strict)
        assert reference.encode(pre, torch.eye(3), torch.zeros(3), None, activation).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu", "post": "none"}, "post: expected relu for a relu SAE, got none"),
        ({"activation": "topk", "k": 3, "post": "elu"}, "post: expected one of .* got 'elu'"),
        ({"activation": "topk", "k": 3, "ranking": "magnitude"}, "ranking: expected value, except .* got magnitude"),
        ({"activation": "relu", "strict": False}, "strict: expected True for a relu SAE, got False"),
        ({"activation": "batch_topk", "threshold": 0.1, "strict": 1}, "strict: expected True or False, got 1"),
        ({"activation": "groupmax", "k": 3}, "k: expected a divisor of F=100 for a groupmax SAE, got 3"),
        ({"activation": "groupmax"}, "k: expected 1 to 100 for a groupmax SAE, got None"),
        ({"activation": "relu", "input_scale": 0.0}, "input_scale: expected a number > 0, got 0"),
        ({"activation": "relu", "input_scale": True}, "input_scale: expected a tensor or a number, got True"),
        ({"activation": "relu", "input_mean": torch.zeros(3).double()}, r"input_mean: expected \[32\] .* got \[3\]"),
    ],
)
def test_wrong_variants_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        random_sae(32, 100, **options)


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("kind", ["combined", "gradient", "gradient_signed", "sae_error"])
def test_small_gradients_meet_a_float16_sae_at_its_scale(kind, activation):
    """A target that is multiplied by a small number gives the same scores, as much smaller."""
    k = {"k": 9} if activation == "topk" else {}
    sae, (x, g) = random_sae(32, 100, activation, **k).half(), tokens().float()
    g = g * torch.tensor([1.0, 1e-3])[:, None, None]  # images differ
    gate = fastfg.Gate((0,), score=kind)
    own = PatchScores(x.half() if kind == "sae_error" else x, g, sae).score(gate)
    for factor in (2.0**-20, 2.0**10):  # exact in every dtype
        scores = PatchScores(x.half() if kind == "sae_error" else x, g * factor, sae).score(gate)
        torch.testing.assert_close(scores / factor, own, rtol=1e-5, atol=1e-7)
    exact = PatchScores(x.double(), g.double(), sae.double()).score(gate)
    for found, expected in zip(own.double(), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("ratio", [1e3, 1e6, float("nan")])
def test_one_large_gradient_takes_nothing_from_the_others(ratio):
    sae, (x, g) = random_sae(32, 100, "topk", k=9).half(), tokens().float()
    g[0, 5] *= ratio
    gate = fastfg.Gate((0,))
    found = PatchScores(x, g, sae).score(gate)[0].double()
    exact = PatchScores(x.double(), g.double(), sae.double()).score(gate)[0]
    others = torch.arange(len(exact)) != 5
    error = (found - exact)[others].abs()
    assert float(error.max()) < 0.02 * float(exact[others].abs().max())


def test_features_of_a_float16_sae_have_the_targets_scale():
    sae, (x, g) = random_sae(32, 100, "topk", k=9).half(), tokens().float()
    gate = fastfg.Gate((0,))
    own, small = (PatchScores(x, g * factor, sae).features(gate, 9).values for factor in (1.0, 2.0**-20))
    torch.testing.assert_close(own.sum(-1), PatchScores(x, g, sae).score(gate), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(small * 2.0**20, own, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_codes_of_half_precision_are_summed_in_float32(activation):
    sae, (x, g) = random_sae(32, 100, activation, **({"k": 9} if activation == "topk" else {})).half(), tokens().float()
    gate = fastfg.Gate((0,), score="activation")
    found = PatchScores(x * 1e4, g, sae).score(gate).double()
    expected = PatchScores(x.double() * 1e4, g.double(), sae.double()).score(gate)
    assert float(expected.max()) > torch.finfo(torch.float16).max
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=0)


@pytest.mark.parametrize("kind", ["combined", "activation", "sae_error"])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_residuals_meet_an_sae_in_half_precision(dtype, normalize, kind):
    sae, (x, g) = random_sae(32, 100, "relu", normalize=normalize).to(dtype), tokens().float()
    gate = fastfg.Gate((0,), score=kind, rescale=kind == "combined")
    found = PatchScores(x * 1e-6, g, sae).score(gate).double()
    expected = PatchScores(x.double() * 1e-6, g.double(), sae.double()).score(gate)
    assert float((found - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())
