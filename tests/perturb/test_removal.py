"""Removed patches leave the sequence: equal to a loop over single images, for every family."""

import pytest
import torch

import fastfg
from fastfg.checks import check_target
from fastfg.models import adapt
from fastfg.models.hold import hold
from fastfg.perturb import PatchGrid
from fastfg.perturb.removal import Removal
from fastfg.perturb.removal_check import _check_order, check_removal
from tests.models.families import FAMILIES, HYBRIDS, build, timm_eva
from tests.perturb.test_tokens import size_of
from tests.tools import tiny_vit


def looped(adapter, image, mask):
    """The model's output for one image [C, H, W] when its blocks see the tokens of the patches left alone."""
    prefix, left = adapter.num_prefix_tokens, [i for i, removed in enumerate(mask.tolist()) if not removed]

    def first(module, args, kwargs):
        name = None if args else next(iter(kwargs))
        x = args[0] if args else kwargs[name]
        x = torch.stack([x[0, i] for i in [*range(prefix), *(prefix + i for i in left)]])[None]
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {name: x})

    def rotary(module, args, kwargs):
        rope = kwargs.get("rope")
        return None if rope is None else (args, kwargs | {"rope": rope[..., left, :]})

    handles = [adapter.blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_pre_hook(rotary, with_kwargs=True) for block in adapter.blocks]
    output = check_target(adapter, fastfg.Target(1)).source(adapter.forward(image[None]), 1)[0]
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("name", FAMILIES)
def test_removed_is_a_loop_over_single_images_for_every_family(name):
    model = build(name)
    adapter = adapt(model)
    size = size_of(name)
    gh, gw = adapter.grid(size)
    random = torch.Generator().manual_seed(2)
    images = torch.randn(2, adapter.in_chans, *size, dtype=torch.float64, generator=random)
    maps = torch.rand(2, gh, gw, generator=random)
    target = fastfg.Target(1, link=None)
    scores = fastfg.evaluate(
        model, images, maps, target=target, metrics=["pixel_flipping"], baseline="removed", batch_size=3
    )
    assert scores.path == "removed"
    curve = scores.details["pixel_flipping"]["curve"]
    alone = FAMILIES[name][3] != "pool" and all(s.stop is not None for s in FAMILIES[name][3])
    alone |= name.startswith("open_clip") and FAMILIES[name][3] == "pool"  # its pooling sees the class token
    P = gh * gw
    assert curve.shape == (2, P + 1 if alone else P)
    with hold(model, adapter.flags), torch.no_grad():
        for image, one, found in zip(images, maps.flatten(1), curve, strict=True):
            order = one.argsort(descending=True)
            masks = torch.zeros(len(found), P, dtype=torch.bool)
            for step in range(len(found)):
                masks[step, order[:step]] = True
            expected = torch.stack([looped(adapter, image, mask)[1] for mask in masks])
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"attn_type": "rope", "rope_type": "mixed"}])
def test_rotary_positions_are_those_of_the_kept_patches(options):
    torch.manual_seed(0)
    model = timm_eva(**options).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    adapter = adapt(model)
    images, masks = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.zeros(3, 16, dtype=torch.bool)
    for row in masks:
        row[torch.randperm(16)[:9]] = True
    with hold(model, adapter.flags), torch.no_grad():
        path = Removal(adapter)
        found = path.run(path.inputs(path.prepare(images, []), torch.arange(3), masks))
        expected = torch.stack([looped(adapter, image, mask) for image, mask in zip(images, masks, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_one_metric_may_remove_while_others_fill(model, images):
    maps = torch.rand(3, 4, 6)
    both = fastfg.evaluate(model, images, maps, target=1, pixel_flipping={"baseline": "removed"})
    filled = fastfg.evaluate(model, images, maps, target=1)
    removed = fastfg.evaluate(model, images, maps, target=1, baseline="removed", metrics=["pixel_flipping"])
    assert (both.path, filled.path, removed.path) == ("tokens, removed", "tokens", "removed")
    torch.testing.assert_close(both["saco"], filled["saco"])
    torch.testing.assert_close(both["pixel_flipping"], removed["pixel_flipping"])
    assert (both["pixel_flipping"] - filled["pixel_flipping"]).abs().min() > 1e-6
    assert removed.forwards["run"] == 3 * 25


def test_a_target_that_reads_the_patches_of_the_output(model, images):
    """The last block then computes all tokens."""
    maps = torch.rand(3, 4, 6)
    model.forward = model.forward_features  # [B, N, d]

    def target(tokens):
        return tokens[:, 1:].mean(1)[:, 2]

    options = {"target": target, "metrics": ["saco"], "saco": {"n_bins": 4}}
    filled = fastfg.evaluate(model, images, maps, **options)
    assert filled.path == "tokens"
    pixels = fastfg.evaluate(model, images, maps, path="pixels", **options)
    torch.testing.assert_close(filled.details["saco"], pixels.details["saco"], rtol=1e-9, atol=1e-9)
    removed = fastfg.evaluate(model, images, maps, baseline="removed", **options)
    assert removed.errors == []
    assert removed.path == "removed"


def test_all_metrics_may_remove(model, images):
    scores = fastfg.evaluate(model, images, torch.rand(2, 3, 4, 6), target=1, baseline="removed")
    assert not scores.errors
    assert scores.path == "removed"


def test_a_callable_can_not_lose_tokens(model, images):
    with pytest.raises(ValueError, match="baseline: expected a fill for a model of no known family, got 'removed'"):
        fastfg.evaluate(lambda x: model(x), images, torch.rand(3, 4, 6), target=1, baseline="removed")


class Shift(torch.nn.Module):
    """Mixes each token with the next one: the place in the sequence matters."""

    def forward(self, x):
        return x + 0.3 * x.roll(1, dims=1)


class FixedSize(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(n, 1, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    ("part", "reason"),
    [(Shift(), "a token's place in the sequence changes its output"), (FixedSize(25), "must match the size")],
)
def test_models_that_can_not_lose_tokens_say_so(model, images, part, reason):
    model.blocks[1].norm2 = torch.nn.Sequential(model.blocks[1].norm2, part)
    with pytest.raises(ValueError, match=f"baseline: expected a fill for this model, got 'removed': .*{reason}"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=1, baseline="removed")


def test_a_path_around_the_tokens_is_found(model, images):
    class Side(type(model)):
        def forward(self, x):
            return super().forward(x) + x.mean((1, 2, 3))[:, None] * torch.arange(5)

    model.__class__ = Side
    with pytest.raises(ValueError, match="with no patch removed its tokens give another output than the image"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=1, baseline="removed")


class Corners(fastfg.metrics.Metric):
    """Removes everything first: a mask without meaning for a model that has no prefix tokens."""

    name = title = short = "corners"
    higher_is_better = True

    def plan(self, maps, grid, random):
        masks = torch.zeros(len(maps), 3, grid.n_patches, dtype=torch.bool)
        masks[:, 0], masks[:, 1, 0], masks[:, 2, -1] = True, True, True
        return fastfg.metrics.Plan(masks)

    def score(self, maps, plan, readings):
        return readings.logit.mean(1), {}


def test_a_model_without_prefix_has_no_reading_without_patches():
    model, random = build("transformers SigLIP"), torch.Generator().manual_seed(0)
    images, maps = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=random), torch.rand(2, 4, 4)
    options = {"target": 1, "baseline": "removed"}
    curve = fastfg.evaluate(model, images, maps, metrics=["pixel_flipping"], **options).details["pixel_flipping"][
        "curve"
    ]
    assert curve.shape == (2, 16)
    with pytest.raises(ValueError, match="corners: expected masks that leave a patch, .* got one that removes all"):
        fastfg.evaluate(model, images, maps, metrics=[Corners()], **options)


def test_a_batch_size_of_one_and_large_batches_agree(model, images):
    maps, options = torch.rand(2, 3, 4, 6), {"target": 1, "baseline": "removed", "metrics": ["saco", "pixel_flipping"]}
    one, many = (fastfg.evaluate(model, images, maps, batch_size=size, **options) for size in (1, 64))
    assert one.forwards == many.forwards
    for metric in one:
        torch.testing.assert_close(one[metric], many[metric], rtol=1e-9, atol=1e-12)


def test_logits_near_zero_are_no_reason_to_refuse_a_model(images):
    """Where a model can't tell two classes apart, its logits are rounding, and differ by all of it."""
    model = tiny_vit(torch.float32)
    adapter, images = adapt(model), images.float()
    target = check_target(adapter, fastfg.Target(1))
    with hold(model, adapter.flags), torch.no_grad():
        path = Removal(adapter)
        P = path.prepare(images[:1], [])[0].shape[1] - adapter.num_prefix_tokens
        kept = torch.randperm(P, generator=torch.Generator().manual_seed(0))[: P // 2].sort().values  # as in the check
        model.head.bias -= path.one(images[:1], kept)[0]
        assert path.one(images[:1], kept).abs().max() < 1e-6
        assert check_removal(adapter, PatchGrid.of((32, 48), (4, 6)), images, target)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_stem_of_convolutions_can_lose_tokens(name):
    """They are as many as the patches and in their order, though each also sees a patch's neighbours."""
    model = build(name)
    size = (64, 64) if "ResNet" in name else (32, 32)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    maps = torch.rand(2, *adapt(model).grid(size))
    found = fastfg.evaluate(model, images, maps, target=1, metrics=["saco"], baseline="removed", saco={"n_bins": 2})
    assert found.path == "removed"


@pytest.mark.parametrize("kernel", [12, 16, 24])
@pytest.mark.parametrize("seed", range(3))
def test_patches_that_overlap_can_lose_tokens(images, kernel, seed):
    model = tiny_vit(seed=seed)
    model.patch_embed.proj = torch.nn.Conv2d(3, 32, kernel, stride=8, padding=(kernel - 8) // 2).double()
    for given in (images[:1], images[:1] * 0, images[1:2] * 1e-6 + 3):
        found = fastfg.evaluate(model, given, torch.rand(1, 4, 6), target=1, metrics=["saco"], baseline="removed")
        assert found.path == "removed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_position_embeddings_hide_no_change_of_a_token(images, dtype):
    model = tiny_vit(dtype=dtype)
    model.pos_embed.data.add_(300)
    path, grid = Removal(adapt(model)), PatchGrid.of((32, 48), (4, 6))
    with hold(model, path.adapter.flags), torch.no_grad():
        path.prepare(images[:1].to(dtype), [])
        _check_order(path, grid, images[:1].to(dtype))


def test_a_model_that_writes_into_its_input(model, images):
    class Careless(type(model)):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    model.__class__ = Careless
    given = images.clone()
    found = fastfg.evaluate(model, given, torch.rand(3, 4, 6), target=1, metrics=["saco"], baseline="removed")
    assert found.path == "removed"
    assert torch.equal(given, images)
