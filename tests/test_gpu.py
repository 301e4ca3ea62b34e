"""On a CUDA device: the same maps and scores as on the CPU, in every precision."""

import pytest
import torch

import fastfg
from tests.models.families import FAMILIES, build
from tests.tools import random_sae, tiny_vit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attribution_is_that_of_the_cpu(dtype, images, saes, gate):
    model = tiny_vit()
    expected = fastfg.attribute(model, images, saes=saes, gate=gate, target=1, features=3)
    there = {block: sae.to("cuda", dtype) for block, sae in saes.items()}
    model.to("cuda", dtype)
    found = fastfg.attribute(model, images.to("cuda", dtype), saes=there, gate=gate, target=1, features=3)
    assert found.maps.is_cuda
    maps, exact = found.maps.double().cpu().flatten(1), expected.maps.flatten(1)
    if dtype in (torch.float64, torch.float32):
        error = (maps - exact).abs().amax(1) / exact.abs().amax(1)
        assert float(error.max()) < (1e-10 if dtype == torch.float64 else 1e-4)
    else:
        assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.97 for pair in zip(maps, exact, strict=True))


def test_a_shuffled_decoder_is_the_same_everywhere(images, saes):
    model, gate = tiny_vit(), fastfg.Gate((1, 2), shuffle_seed=12345)
    expected = fastfg.attribute(model, images, saes=saes, gate=gate).maps
    there = {block: sae.cuda() for block, sae in saes.items()}
    found = fastfg.attribute(model.cuda(), images.cuda(), saes=there, gate=gate).maps
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-12)


def test_scores_are_those_of_the_cpu(images):
    model, maps = tiny_vit(), torch.rand(2, 3, 4, 6)
    expected = fastfg.evaluate(model, images, maps, target=1)
    found = fastfg.evaluate(model.cuda(), images.cuda(), maps.cuda(), target=1, keys=expected.image_keys)
    for metric in expected:
        torch.testing.assert_close(found[metric], expected[metric], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    model = build(name)
    side = 64 if name in ("timm DINOv2", "timm DINOv2, registers", "timm DINOv3", "timm SigLIP", "timm CLIP") else 32
    images = torch.randn(2, 3, *((24, 40) if "wide" in name else (side, side)), dtype=torch.float64)
    expected = fastfg.attribute(model, images).maps
    found = fastfg.attribute(model.cuda(), images.cuda()).maps.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10 * float(expected.max()))


def test_images_and_saes_on_another_device_are_named(images):
    model = tiny_vit().cuda()
    with pytest.raises(ValueError, match="images: expected them on cuda:0, .* got cpu"):
        fastfg.attribute(model, images)
    sae = random_sae(32, 100, "topk", k=9)
    with pytest.raises(ValueError, match=r"saes\[1\]: expected it on cuda:0, .* got cpu"):
        fastfg.attribute(model, images.cuda(), saes={1: sae}, gate=fastfg.Gate((1,)))
