"""Small gradients: those of a float16 model do not leave float16's range, and no map drowns in its first row."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastfg
from fastfg.attribution import gradient_scale
from fastfg.targets import as_target

timm = fastfg.models.import_timm()
SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 100}
METHODS = ["grad_cam", "gradient_x_input", "integrated_gradients"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**SHAPE).eval()
    with torch.no_grad():
        model.pos_embed[:, 1:] += 5 * torch.randn(32)  # a large residual stream has small gradients
    return model


def sae():
    torch.manual_seed(1)
    W = F.normalize(torch.randn(64, 32), dim=1)
    return fastfg.SparseAutoencoder(W.T.contiguous(), torch.zeros(64), W, torch.zeros(32), k=8)


def explained(model, dtype, target):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    own = sae()
    if dtype == torch.float64:
        weights = (getattr(own, name).double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        own = fastfg.SparseAutoencoder(*weights, k=8)
    return fastfg.attribute(
        copy.deepcopy(model).to(dtype), images.to(dtype), saes={1: own}, gate=[None, fastfg.Gate((1,))], target=target,
        methods=METHODS, integrated_gradients={"steps": 4},
    )  # fmt: skip


def like(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("target", [3, lambda o: 1e-3 * o.float().softmax(-1)[:, 3]], ids=["logit", "small"])
def test_small_gradients_are_kept(model, target):
    found, expected = explained(model, torch.float16, target), explained(model, torch.float64, target)
    assert float((found.scores[1][1] == 0).double().mean()) == 0
    assert not torch.equal(found.maps[0], found.maps[1])
    assert like(found.scores[1][1], expected.scores[1][1]) > 0.99
    for a, b in ((found.maps, expected.maps), *((found.methods[m], expected.methods[m]) for m in METHODS)):
        assert like(a, b) > 0.98
        assert float(a.double().norm() / b.norm()) == pytest.approx(1, abs=0.05)  # at the target's own scale


def test_large_gradients_are_run_again(model, monkeypatch):
    with torch.no_grad():
        model.head.weight[3] *= 200
    expected = explained(model, torch.float64, 3)
    monkeypatch.setattr(gradient_scale, "EXPONENTS", (15, -2))
    assert like(explained(model, torch.float16, 3).maps, expected.maps) > 0.98
    monkeypatch.setattr(gradient_scale, "EXPONENTS", (15,))
    assert not bool(explained(model, torch.float16, 3).maps.isfinite().all())


def test_an_image_that_overflows_or_is_nan_leaves_its_neighbours_alone(model):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)).half()
    options = {"target": 3, "methods": METHODS, "integrated_gradients": {"steps": 2}}
    model = model.half()
    alone = fastfg.attribute(model, images[:2], **options)
    images[2] = 65000.0
    images[2, :, ::2] = -65000.0
    together = fastfg.attribute(model, images, **options)
    assert not bool(together.maps[2].isfinite().all())
    torch.testing.assert_close(together.maps[:2], alone.maps, rtol=0.02, atol=0)
    for name in METHODS:
        torch.testing.assert_close(together.methods[name][:2], alone.methods[name], rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-12, 1e6])
def test_targets_beyond_the_range_of_their_output(model, factor):
    def target(logits):
        return factor * logits.to(torch.promote_types(logits.dtype, torch.float32))[:, 3]

    found, expected = explained(model, torch.float16, target), explained(model, torch.float64, target)
    assert like(found.maps, expected.maps) > 0.98
    assert float(found.maps.double().norm() / expected.maps.norm()) == pytest.approx(1, abs=0.05)


def test_each_image_has_its_own_factor():
    output = torch.tensor([[1.0, 2.0], [1e-6, 3.0], [0.0, 5.0]], dtype=torch.float64).requires_grad_()
    square = as_target(lambda rows: rows[:, 0] ** 2)
    exponents = gradient_scale.Exponents(3, torch.device("cpu"))
    factors = gradient_scale.scale_of(square.value(output, 3), square, output, exponents)
    scaled = factors * 2 * output[:, 0].detach()  # the gradient at the output
    assert torch.all((scaled[:2] >= 2**8) & (scaled[:2] < 2**9))
    assert float(factors[2]) == 1
    assert exponents.lower(torch.tensor([True, False, False]))
    assert exponents.values.tolist() == [-2, 8, 8]
    half = torch.tensor([[1e-6]], dtype=torch.float16).requires_grad_()
    assert float(gradient_scale.scale_of(half[:, 0], square, half, gradient_scale.Exponents(1, half.device))) == 2**15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_gradients_show_under_mean_pooling(dtype):
    """Relevancy starts at 1 / N for every token there."""
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**SHAPE, global_pool="avg", class_token=False).eval()
    images = torch.randn(2, 3, 64, 64)

    def small(logits):
        return 1e-6 * logits[:, 3]

    found = fastfg.attribute(copy.deepcopy(model).to(dtype), images.to(dtype), target=small)
    expected = fastfg.attribute(model.double(), images.double(), target=small)
    assert found.maps.dtype == torch.float64
    moved = [maps - maps.mean((1, 2), keepdim=True) for maps in (found.maps, expected.maps)]
    assert like(*moved) > (0.99999 if dtype == torch.float32 else 0.99)
