"""Attribution on the fake GPU equals attribution on the CPU for every model, gate and SAE; see test_rehearsal.py."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastfg
from fastfg import ops
from fastfg.types import METHODS, SCORE_KINDS
from tests.attribution.test_attribute import assert_unchanged, state_of
from tests.models.families import FAMILIES, build
from tests.rehearsal.card import OnCard
from tests.tools import ACTIVATIONS, random_sae, tiny_vit

SIZE = (16, 24)  # 2 x 3 patches
ALL_GATES = [
    None,
    fastfg.Gate((1,), kappa=1.0, c_max=50.0),
    fastfg.Gate((1,), kappa=0.5, c_max=10.0),
    fastfg.Gate((1,), shuffle_seed=12345),
    *(fastfg.Gate((1,), score=score) for score in SCORE_KINDS[1:]),
]


def given(dtype=torch.float64, activation="topk", normalize="none", **options):
    """A model, images and SAEs of blocks 1 and 2, on the CPU."""
    model = tiny_vit(img_size=SIZE, dtype=dtype, **options)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    parameters = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in ACTIVATIONS[activation].items()
    }
    make = {"activation": activation, "normalize": normalize, "dtype": dtype} | parameters
    return model, images, {block: random_sae(32, 100, seed=block, **make) for block in (1, 2)}


def to_card(model, images, saes=None):
    return model.cuda(), images.cuda(), {block: sae.cuda() for block, sae in (saes or {}).items()}


def same(found, expected, rtol=1e-9):
    assert isinstance(found, OnCard)
    assert found.device == torch.device("cuda:0")
    assert found.dtype == expected.dtype
    atol = rtol * float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=atol, equal_nan=True)


def same_result(found, expected, rtol=1e-9):
    """All tensors of the result."""
    same(found.maps, expected.maps, rtol)
    same(found.logits, expected.logits, rtol)
    assert found.target.tolist() == expected.target.tolist()
    for parts, exact in ((found.scores, expected.scores), (found.gates, expected.gates)):
        assert parts.keys() == exact.keys()
        for block in parts:
            same(parts[block], exact[block], rtol)
    for block, features in expected.features.items():
        same(found.features[block].values, features.values, rtol)
        assert found.features[block].indices.tolist() == features.indices.tolist()
    for name, baseline in expected.methods.items():
        same(found.methods[name], baseline, rtol)


MODELS = {
    "registers": {"reg_tokens": 4},
    "mean of patches": {"global_pool": "avg"},
    "attention pooling": {"global_pool": "map", "class_token": False},
}


@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, identity):
    model, images, saes = given(**MODELS[name])
    options = {"gate": [None, fastfg.Gate((1, 2))], "identity": identity, "methods": METHODS, "features": 3}
    expected = fastfg.attribute(model, images, saes=saes, **options)
    model, images, saes = to_card(model, images, saes)
    same_result(fastfg.attribute(model, images, saes=saes, **options), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = build(name)
    side = 64 if name in ("timm DINOv2", "timm DINOv2, registers", "timm DINOv3", "timm SigLIP", "timm CLIP") else 32
    images = torch.randn(2, 3, *((24, 40) if "wide" in name else (side, side)), dtype=torch.float64)
    gate = fastfg.Gate((0,), score="gradient_x_residual")
    expected = fastfg.attribute(model, images, gate=gate)
    maps = expected.maps
    scores = fastfg.evaluate(model, images, maps, target=1, metrics=["pixel_flipping"])
    model, images, _ = to_card(model, images)
    same_result(fastfg.attribute(model, images, gate=gate), expected, rtol=1e-6)
    found = fastfg.evaluate(model, images, maps, target=1, metrics=["pixel_flipping"])
    torch.testing.assert_close(found["pixel_flipping"], scores["pixel_flipping"], rtol=1e-6, atol=1e-9)
    assert found.path == scores.path


def test_every_score_of_a_topk_sae_by_triton(caplog):
    model, images, saes = given(torch.float32, normalize="layer_norm", reg_tokens=1)
    gates = [*ALL_GATES, fastfg.Gate((1,), rescale=True)]
    expected = fastfg.attribute(model, images, saes=saes, gate=gates, target=1, features=3, identity="paper")
    model, images, saes = to_card(model, images, saes)
    with caplog.at_level(logging.INFO, "fastfg"):
        found = fastfg.attribute(model, images, saes=saes, gate=gates, target=1, features=3, identity="paper")
    same_result(found, expected, rtol=1e-4)
    chosen = [message for message in caplog.messages if "on cuda (torch.float32)" in message]
    assert {line.split()[0] for line in chosen} == {"encode_topk", "project", "gate", "relevancy"}
    assert all(line.endswith("triton") for line in chosen)


@pytest.fixture
def launched(monkeypatch):
    """Names of the ops that ``attribute`` calls, in order."""
    names = []

    def counted(name, op):
        return lambda *given, **options: names.append(name) or op(*given, **options)

    for name in ("encode_topk", "encode_project", "project", "gate", "relevancy", "gated_relevancy"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return names


ONE_LAUNCH = {
    "one gate": fastfg.Gate((1, 2), kappa=1.0, c_max=50.0),
    "several gates that share blocks": [
        None,
        fastfg.Gate((1,), kappa=1.0, c_max=50.0),
        fastfg.Gate((1, 2), kappa=0.5, c_max=10.0),
        fastfg.Gate((2,), kappa=2.0, c_max=20.0),
    ],
}


@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the reference runs float64
@pytest.mark.parametrize("gate", ONE_LAUNCH.values(), ids=ONE_LAUNCH)
def test_gated_blocks_in_one_launch(gate, dtype, identity, launched):
    model, images, saes = given(dtype, normalize="layer_norm", reg_tokens=2)
    options = {"gate": gate, "identity": identity, "target": 1}
    expected = fastfg.attribute(model, images, saes=saes, **options)
    assert "gated_relevancy" not in launched  # the CPU uses the separate ops
    model, images, saes = to_card(model, images, saes)
    launched.clear()
    found = fastfg.attribute(model, images, saes=saes, **options)
    steps = ["relevancy", "encode_topk", "gated_relevancy", "encode_topk", "gated_relevancy", "relevancy"]
    assert launched == steps  # blocks 3 to 0
    same_result(found, expected, rtol=1e-9 if dtype == torch.float64 else 1e-4)


def test_rows_of_mean_pooling_are_in_float64_on_the_card(launched):
    model, images, saes = given(torch.float32, global_pool="avg")
    options = {"gate": [None, fastfg.Gate((1,))], "target": 1}
    expected = fastfg.attribute(model, images, saes=saes, **options)
    model, images, saes = to_card(model, images, saes)
    launched.clear()
    found = fastfg.attribute(model, images, saes=saes, **options)
    assert found.maps.dtype == torch.float64
    assert launched.count("relevancy") == 4
    assert "gated_relevancy" not in launched
    same_result(found, expected, rtol=1e-4)


@pytest.mark.parametrize("other", ["shuffle", "score", "rescale", "features"])
def test_other_gates_use_the_separate_ops(other, launched):
    model, images, saes = given(normalize="layer_norm")
    gates = {
        "shuffle": fastfg.Gate((1,), shuffle_seed=3),
        "score": fastfg.Gate((1,), score="activation"),
        "rescale": fastfg.Gate((1,), rescale=True),
        "features": fastfg.Gate((1,)),
    }
    options = {"gate": [fastfg.Gate((1, 2)), gates[other]], "features": 2 * (other == "features"), "target": 1}
    expected = fastfg.attribute(model, images, saes=saes, **options)
    model, images, saes = to_card(model, images, saes)
    launched.clear()
    same_result(fastfg.attribute(model, images, saes=saes, **options), expected)
    assert launched.count("gated_relevancy") == (other != "features")  # block 2 has one gate, which the op can compute
    assert launched.count("relevancy") == 3 + (other == "features")


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_other_saes_by_triton(activation):
    model, images, saes = given(torch.float32, activation, normalize="layer_norm")
    gates = ALL_GATES if activation == "relu" else ALL_GATES[1]
    options = {"gate": gates, "target": 1, "features": 2 * (activation == "jumprelu")}
    expected = fastfg.attribute(model, images, saes=saes, **options)
    model, images, saes = to_card(model, images, saes)
    same_result(fastfg.attribute(model, images, saes=saes, **options), expected, rtol=1e-4)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_bfloat16(activation):
    model, images, saes = given(torch.bfloat16, activation, gain=4)
    gates = [None, fastfg.Gate((1,))]
    exact = {block: sae.double() for block, sae in given(torch.bfloat16, activation)[2].items()}
    expected = fastfg.attribute(model.double(), images.double(), saes=exact, gate=gates, target=1)
    model, images, saes = to_card(model.bfloat16(), images, saes)
    found = fastfg.attribute(model, images, saes=saes, gate=gates, target=1)
    assert found.maps.dtype == torch.float32
    assert found.logits.dtype == torch.bfloat16
    pairs = zip(found.maps.cpu().double().flatten(2), expected.maps.flatten(2), strict=True)
    for ours, theirs in pairs:
        assert float(fastfg.metrics.correlation(ours, theirs, kind="pearson").min()) > 0.95


def test_under_autocast():
    model, images, saes = given(torch.float32, "relu", gain=4)
    expected = fastfg.attribute(model, images, saes=saes, gate=ALL_GATES[1], target=1)
    model, images, saes = to_card(model, images, saes)
    with torch.autocast("cuda", torch.bfloat16):
        found = fastfg.attribute(model, images, saes=saes, gate=ALL_GATES[1], target=1)
    assert found.maps.dtype == torch.float32
    ours, theirs = found.maps.cpu().flatten(1), expected.maps.flatten(1)
    assert float(fastfg.metrics.correlation(ours, theirs, kind="pearson").min()) > 0.9


def test_gates_of_several_images():
    """The kernel gets kappa and c_max as tensors, with one number per row."""
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for kappa, c_max in ((1.0, 10.0), (torch.tensor([0.5, 2.0])[:, None, None], 50.0)):
        expected = ops.gate(scores, kappa, c_max, backend="reference")
        same(ops.gate(scores.cuda(), kappa, c_max), expected, rtol=1e-5)


def test_a_gated_block_in_one_op():
    """Rows, kappa and c_max may be expanded, as the first rows of relevancy are."""
    random = torch.Generator().manual_seed(0)
    q, k, v, dO = torch.randn(4, 2, 2, 6, 8, generator=random)
    g, W_dec = torch.randn(2, 5, 16, generator=random), torch.randn(30, 16, generator=random)
    values, indices = torch.rand(2, 5, 4, generator=random), torch.randint(0, 30, (2, 5, 4), generator=random)
    rows = torch.eye(6)[:1].expand(3, 2, -1)
    kappa, c_max = torch.ones(1).expand(3), torch.tensor([1.0, 10.0, 50.0])
    arguments = (rows, q, k, v, dO, 0.35, g, W_dec, values, indices, kappa, c_max)
    expected = ops.gated_relevancy(*arguments, backend="reference")
    there = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
    there[0], there[10] = there[0][:1].expand(3, -1, -1), there[10][:1].expand(3)
    for found, exact in zip(ops.gated_relevancy(*there, backend="triton"), expected, strict=True):
        same(found, exact, rtol=1e-4)


@pytest.mark.parametrize("target", [3, [3, 1], torch.tensor([3, 1]), None], ids=str)
def test_targets_from_the_cpu(target):
    model, images, _ = given()
    expected = fastfg.attribute(model, images, target=target)
    model, images, _ = to_card(model, images)
    same_result(fastfg.attribute(model, images, target=target), expected)
    if isinstance(target, torch.Tensor):
        same_result(fastfg.attribute(model, images, target=target.cuda()), expected)


def test_arguments_on_another_device_are_named():
    model, images, saes = given()
    gate = fastfg.Gate((1,))
    with pytest.raises(ValueError, match="images: expected them on cpu, as the model is, got cuda:0"):
        fastfg.attribute(model, images.cuda())
    model = model.cuda()
    with pytest.raises(ValueError, match="images: expected them on cuda:0, as the model is, got cpu"):
        fastfg.attribute(model, images)
    with pytest.raises(ValueError, match="images: expected them on cuda:0, as the model is, got cpu"):
        fastfg.residuals(model, images, [1])
    with pytest.raises(ValueError, match=r"saes\[1\]: expected it on cuda:0, .* got cpu \(sae.to\('cuda:0'\)\)"):
        fastfg.attribute(model, images.cuda(), saes=saes, gate=gate)


@pytest.mark.parametrize("fails", [False, True])
def test_inputs_and_model_are_unchanged(fails):
    model, images, saes = to_card(*given())
    model.train()
    model.blocks[1].eval()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    kept, before, objects = images.clone(), state_of(model), [*model.parameters()]
    weights = saes[1].W_enc.clone()
    if fails:  # the check is in a hook, in the device's own thread
        wrong = random_sae(16, 50, "topk", k=3).cuda()
        with pytest.raises(ValueError, match=r"saes\[1\]: expected width 32"):
            fastfg.attribute(model, images, saes={1: wrong}, gate=fastfg.Gate((1,)))
    else:
        fastfg.attribute(model, images, saes=saes, gate=fastfg.Gate((1, 2)), methods=METHODS)
    assert_unchanged(before, state_of(model))
    assert all(p is q for p, q in zip(objects, model.parameters(), strict=True))
    assert torch.equal(images, kept)
    assert images.grad is None
    assert torch.equal(saes[1].W_enc, weights)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model, images, saes = given()
    expected = fastfg.attribute(model, images, saes=saes, gate=ALL_GATES[1])
    model, images, saes = to_card(model, images, saes)
    with context():
        found = fastfg.attribute(model, images, saes=saes, gate=ALL_GATES[1])
    same_result(found, expected)


def test_threads_share_the_devices_own():
    model, images, saes = given()
    expected = [fastfg.attribute(model, images[i : i + 1], saes=saes, gate=ALL_GATES[1]) for i in range(2)]
    model, images, saes = to_card(model, images, saes)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(fastfg.attribute, model, images[i % 2 : i % 2 + 1], saes=saes, gate=ALL_GATES[1])
            for i in range(8)
        ]
    for i, job in enumerate(jobs):
        same_result(job.result(), expected[i % 2])


def test_captums_shape_and_heatmaps():
    model, images, _ = given()
    pixels, heat = fastfg.FeatureGradient(model).attribute(images, target=1), fastfg.attribute(model, images)
    residuals = fastfg.residuals(model, images, [0])[0]
    model, images, _ = to_card(model, images)
    same(fastfg.FeatureGradient(model).attribute(images, target=torch.tensor([[1], [1]])), pixels)
    same(fastfg.attribute(model, images).heatmap(SIZE), heat.heatmap(SIZE))
    same(fastfg.residuals(model, images, [0])[0], residuals)
