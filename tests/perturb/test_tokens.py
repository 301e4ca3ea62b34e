"""Perturbing the tokens gives the logits of the perturbed pixels, for every family, with less work."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastfg
from fastfg.models import adapt
from fastfg.models.hold import hold
from fastfg.perturb import PatchGrid, Pixels, Tokens
from fastfg.perturb.choose import choose_path
from fastfg.targets import logits_of
from tests.models.families import FAMILIES, build
from tests.tools import tiny_vit


def size_of(name):
    if name == "timm ViT, wide image":
        return 24, 40
    return (
        (64, 64)
        if name in ("timm DINOv2", "timm DINOv2, registers", "timm DINOv3", "timm SigLIP", "timm CLIP")
        else (32, 32)
    )


def run(path, images, fills, view, masks):
    prepared = path.prepare(images, fills)
    inputs = path.inputs(prepared, torch.tensor(view), masks)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        logits = logits_of(path.run(inputs))
    return logits, counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_those_of_the_pixels(name):
    model = build(name)
    adapter = adapt(model)
    size = size_of(name)
    grid = PatchGrid.of(size, adapter.grid(size))
    random = torch.Generator().manual_seed(2)
    images = torch.randn(2, adapter.in_chans, *size, dtype=torch.float64, generator=random)
    fills = [images[0].mean().reshape(1, 1, 1), torch.randn(images.shape[1:], dtype=torch.float64, generator=random)]
    masks, view = torch.rand(5, grid.n_patches, generator=random) > 0.4, [0, 0, 1, 1, 1]
    masks[1], masks[2] = False, True
    with hold(model, adapter.flags), torch.no_grad():
        pixels, tokens = Pixels(adapter.forward, grid), Tokens(adapter)
        target = fastfg.Target(0).bound(adapter.logits)
        found = choose_path(adapter, adapter.forward, grid, images, lambda i: fills, "tokens", "float32", target)
        assert found[1] == "tokens"
        expected, whole = run(pixels, images, fills, view, masks)
        found, less = run(tokens, images, fills, view, masks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    if "nn.MultiheadAttention" not in str({type(m).__qualname__ for m in model.modules()}) and tokens.early:
        assert less < whole
    assert not any(m._forward_hooks or m._forward_pre_hooks for block in adapter.blocks for m in block.modules())


def test_skipped_work_of_a_class_token_model():
    """The embedding, the first block's q, k, v, and the unread rows of the last block are not computed."""
    depth, d, N = 3, 48, 17
    model = build("timm ViT")
    adapter = adapt(model)
    images, masks = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.rand(4, 16) > 0.5
    with hold(model, adapter.flags), torch.no_grad():
        _, flops = run(Tokens(adapter), images, [images.mean().reshape(1, 1, 1)], [0] * 4, masks)
    block = 12 * N * d * d  # multiply-adds of its linear layers
    attention = 2 * N * N * d
    first, middle, last = 9 * N * d * d + attention, block + attention, 3 * N * d * d + 9 * d * d + attention // N
    left = 16 * 3 * 8 * 8 * d + 3 * d * d  # one image is embedded, one token goes through q, k, v
    assert depth == 3
    assert flops == pytest.approx(2 * (4 * (first + middle + last + d * 7) + left), rel=0.02)


def test_a_model_whose_patches_overlap_is_perturbed_by_pixels(caplog):
    model = tiny_vit()
    stem = model.patch_embed.proj
    model.patch_embed.proj = torch.nn.Conv2d(3, stem.out_channels, 12, stride=8, padding=2).double()
    images, maps = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.rand(2, 4, 6)
    scores = fastfg.evaluate(model, images, maps, target=1, metrics=["saco"])
    assert scores.path.startswith("pixels (perturbing pixels changes tokens of patches that are not removed, by ")
    assert "perturbing pixels" in caplog.text
    with pytest.raises(ValueError, match="path: expected 'pixels' for this model, as perturbing pixels changes tokens"):
        fastfg.evaluate(model, images, maps, target=1, metrics=["saco"], path="tokens")


@pytest.mark.parametrize("metric", ["saco", "faithfulness_correlation", "pixel_flipping"])
@pytest.mark.parametrize("baseline", ["mean", "running_mean", "blur", "noise", "channel_mean"])
def test_both_paths_give_the_same_scores(model, images, metric, baseline):
    maps = torch.rand(2, 3, 4, 6)
    options = {"target": 1, "metrics": [metric], "baseline": baseline}
    tokens = fastfg.evaluate(model, images, maps, path="tokens", **options)
    pixels = fastfg.evaluate(model, images, maps, path="pixels", **options)
    assert (tokens.path, pixels.path) == ("tokens", "pixels")
    assert tokens.forwards == pixels.forwards
    torch.testing.assert_close(tokens[metric], pixels[metric], rtol=1e-9, atol=1e-12)


def test_threads_may_share_a_model(model, images):
    maps = torch.rand(3, 4, 6)

    def judge(target):
        return [fastfg.evaluate(model, images, maps, target=target, path="tokens")["pixel_flipping"] for _ in range(5)]

    expected = [judge(target)[0] for target in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, theirs in zip(pool.map(judge, range(4)), expected, strict=True):
            for scores in found:
                torch.testing.assert_close(scores, theirs, rtol=1e-9, atol=1e-12)


def test_precision_is_the_models_own_unless_asked_for(model, images):
    maps = torch.rand(3, 4, 6)
    single, given = model.float(), images.float()
    options = {"target": 1, "metrics": ["saco"]}
    exact = fastfg.evaluate(single, given, maps, **options).details["saco"]["impact"]
    for path in ("tokens", "pixels"):
        eighth = fastfg.evaluate(single, given, maps, path=path, precision="float8", **options).details["saco"][
            "impact"
        ]
        assert 0 < (eighth - exact).abs().max() < 0.1
        own = fastfg.evaluate(single, given, maps, path=path, precision="float32", **options).details["saco"]["impact"]
        narrow = fastfg.evaluate(single, given, maps, path=path, precision="bfloat16", **options).details["saco"][
            "impact"
        ]
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-6)
        difference = (narrow - exact).abs().max()
        assert 0 < difference < 0.02
    with pytest.raises(ValueError, match="precision: expected 'auto' or one of .* got 'int8'"):
        fastfg.evaluate(single, given, maps, precision="int8", **options)
    with pytest.raises(ValueError, match="path: expected one of .* got 'fast'"):
        fastfg.evaluate(single, given, maps, path="fast", **options)
    with pytest.raises(ValueError, match="path: expected 'pixels' for a model of no known family, got 'tokens'"):
        fastfg.evaluate(lambda x: single(x), given, maps, path="tokens", **options)
