"""Every family, with fused attention, against the matrix form of relevancy computed from explicit attention maps."""

import pytest
import torch
import torch.nn.functional as F

import fastfg
from fastfg import reference
from fastfg.checks import check_target
from fastfg.models import adapt, import_timm
from tests.models.families import (
    FAMILIES,
    HYBRIDS,
    build,
    hf,
    hooked_vit,
    open_clip_tower,
    timm_eva,
    timm_named,
    timm_vit,
    torchvision_vit,
)
from tests.tools import random_sae

D = {
    "timm DINOv2": 96,
    "timm DINOv2, registers": 96,
    "timm DINOv3": 96,
    "timm SigLIP": 96,
    "timm CLIP": 96,
    "timm hybrid, ResNet stem": 96,
    "timm ViTamin": 384,
    "timm MobileCLIP-B": 768,
}
SIDES = {"timm ViT, wide image": (24, 40), "timm ViTamin": (32, 32), "timm MobileCLIP-B": (32, 32)}


class Explicit:
    """Explicit attention in place of F.scaled_dot_product_attention; records every map."""

    def __init__(self):
        self.attn = []

    def __call__(self, q, k, v, *args, scale=None, **kwargs):
        scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
        attn = torch.softmax(scores, -1)
        attn = attn if attn.requires_grad else attn.requires_grad_()
        self.attn.append(attn)
        return attn @ v


def record(model, adapter, images, monkeypatch):
    """Logits, target, and the attention maps and residual streams with their gradients, without the library's hooks."""
    explicit, x = Explicit(), []
    handles = [
        block.register_forward_hook(lambda m, i, o: x.append(o[0] if isinstance(o, tuple) else o))
        for block in adapter.blocks
    ]
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", explicit)
        for module in model.modules():
            if hasattr(module, "hook_pattern"):  # HookedViT writes its attention out itself
                handles.append(module.hook_pattern.register_forward_hook(lambda m, i, o: explicit.attn.append(o)))
            if type(module).__name__ == "SiglipMultiheadAttentionPoolingHead":  # asks for weights, which needs no SDPA
                attend = module.attention.forward
                patch.setattr(module.attention, "forward", lambda *a, attend=attend: attend(*a, need_weights=False))
        logits = adapter.logits(adapter.forward(images))
    for handle in handles:
        handle.remove()
    target = logits.argmax(1)
    wanted = [*explicit.attn, *x]
    gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), wanted, allow_unused=True)
    n = len(explicit.attn)
    return (
        logits.detach(),
        target,
        list(zip(explicit.attn, gradients[:n], strict=True)),
        list(zip(x, gradients[n:], strict=True)),
    )


def oracle(name, model, images, gate, saes, monkeypatch):
    _, _, prefix, reads = (FAMILIES | HYBRIDS)[name]
    adapter = adapt(model)
    logits, target, attention, streams = record(model, adapter, images, monkeypatch)
    L = len(adapter.blocks)
    N = attention[0][0].shape[-1]
    gates = []
    for block in range(L):
        x, g = streams[block]
        w = torch.ones(len(images), N, dtype=torch.float64)
        if gate is not None and block in gate.layers:
            scores = reference.project_dense(g[:, prefix:], saes[block].W_dec, saes[block].encode(x[:, prefix:]))
            w[:, prefix:] = reference.gate(scores, gate.kappa, gate.c_max)
        gates.append(w.detach())
    R = reference.relevancy_matrix([a.detach() for a, _ in attention[:L]], [d for _, d in attention[:L]], gates)
    if reads == "pool":
        (pool, dpool) = attention[L]
        row = reference.attention_map(pool.detach(), dpool).sum(1)
        row = F.pad(row, (N - row.shape[-1], 0))
    else:
        eye = torch.eye(N, dtype=torch.float64)
        row = torch.stack([eye[tokens].mean(0) for tokens in reads]).mean(0).expand(len(images), -1)
    return logits, target, torch.einsum("bn,bnm->bm", row, R)[:, prefix:].detach()


def setup(name, dtype=torch.float64):
    model = build(name)
    saes = {block: random_sae(D.get(name, 48), 120, "topk", k=9, seed=block) for block in (0, 1)}
    side = SIDES.get(name, (64, 64) if name in D else (32, 32))
    images = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model.to(dtype), {b: sae.to(dtype) for b, sae in saes.items()}, images.to(dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["vanilla", "gated"])
@pytest.mark.parametrize("name", FAMILIES | HYBRIDS)
def test_equals_the_matrix_form(name, gated, monkeypatch):
    model, saes, images = setup(name)
    gate = fastfg.Gate((0, 1), kappa=1.0, c_max=20.0) if gated else None
    logits, target, expected = oracle(name, model, images, gate, saes, monkeypatch)
    result = fastfg.attribute(model, images, saes=saes, gate=gate, target=target)
    torch.testing.assert_close(result.logits, logits, rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 0
    error = (result.maps.flatten(1) - expected).abs().amax(1) / expected.abs().amax(1)
    assert float(error.max()) < 1e-10


@pytest.mark.parametrize("name", FAMILIES | HYBRIDS)
def test_single_precision(name, monkeypatch):
    model, saes, images = setup(name)
    if "Hooked" in name:
        pytest.skip("HookedViT keeps the precision of its config")
    _, target, expected = oracle(name, model, images, None, saes, monkeypatch)
    maps = fastfg.attribute(model.float(), images.float(), target=target).maps
    error = (maps.double().flatten(1) - expected).abs().amax(1) / expected.abs().amax(1)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES | HYBRIDS)
def test_a_sweep_residuals_and_metrics(name):
    model, saes, images = setup(name)
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    gates = [None, fastfg.Gate((0,)), fastfg.Gate((0, 1), shuffle_seed=1), fastfg.Gate((1,), kappa=2.0)]
    together = fastfg.attribute(model, images, saes=saes, gate=gates)
    for c, gate in enumerate(gates):
        alone = fastfg.attribute(model, images, saes=saes, gate=gate)
        torch.testing.assert_close(together.maps[c], alone.maps, rtol=1e-9, atol=1e-14)
    found = fastfg.residuals(model, images, [1])[1]
    assert found.shape == (2, together.maps[0, 0].numel(), D.get(name, 48))
    scores = fastfg.evaluate(
        model, images, together.maps[0], target=together.target, saco={"n_bins": 3}, metrics=["saco", "pixel_flipping"]
    )
    assert scores["saco"].isfinite().all()
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before


@pytest.mark.parametrize(
    "name",
    ["timm ViT", "timm EVA", "transformers ViT", "zero-shot over transformers' SigLIP, pooling head", "timm SigLIP"],
)
def test_attention_that_was_switched_from_fused(name):
    model, _, images = setup(name)
    expected = fastfg.attribute(model, images).maps
    if name.startswith("timm"):
        flags = [m for m in model.modules() if hasattr(m, "fused_attn")]
        for module in flags:
            module.fused_attn = False
    else:
        tower = getattr(model, "visual", model)
        tower.set_attn_implementation("eager")
    torch.testing.assert_close(fastfg.attribute(model, images).maps, expected, rtol=1e-12, atol=0)
    if name.startswith("timm"):
        assert not any(module.fused_attn for module in flags)
    else:
        assert tower.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("transformers ViT", (48, 24)),
        ("transformers DeiT", (48, 24)),
        ("transformers DINOv2", (48, 24)),
        ("zero-shot over transformers' CLIP with projection", (48, 24)),
        ("transformers SigLIP", (48, 24)),
        ("timm DINOv2", (48, 24)),
        ("timm DINOv3", (48, 32)),
    ],
)
def test_interpolated_positions_and_other_grids(name, size, monkeypatch):
    model, saes, _ = setup(name)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    gate = fastfg.Gate((0, 1))
    _, target, expected = oracle(name, model, images, gate, saes, monkeypatch)
    maps = fastfg.attribute(model, images, saes=saes, gate=gate, target=target).maps
    patch = adapt(model).grid(size)
    assert maps.shape == (2, *patch)
    torch.testing.assert_close(maps.flatten(1), expected, rtol=1e-8, atol=1e-10 * float(expected.max()))


def test_a_border_that_fills_no_patch():
    """36 x 35 pixels hold 4 x 4 patches of 8 x 8: the maps are those of the image without its border."""
    torch.manual_seed(0)
    model, cropped = timm_vit(img_size=(36, 35)).double().eval(), timm_vit(img_size=32).double().eval()
    cropped.load_state_dict(model.state_dict())
    adapter = adapt(model)
    assert (adapter.grid((36, 35)), adapter.patch_size) == ((4, 4), (8, 8))
    images = torch.randn(2, 3, 36, 35, dtype=torch.float64)
    found = fastfg.attribute(model, images, methods=["gradient_x_input"])
    expected = fastfg.attribute(cropped, images[..., :32, :32], methods=["gradient_x_input"])
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-12, atol=0)
    for name, maps in expected.methods.items():
        torch.testing.assert_close(found.methods[name], maps, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "grid", "patch"),
    [
        ("vit_so400m_patch14_siglip_384", {"depth": 1}, (27, 27), (14, 14)),
        ("vit_base_r50_s16_224", {"depth": 1}, (14, 14), (16, 16)),
        ("vit_small_r26_s32_224", {"depth": 1}, (7, 7), (32, 32)),
        ("vitamin_small_224", {"depth": 1}, (14, 14), (16, 16)),
        ("vit_base_mci_224", {"depth": 1}, (14, 14), (16, 16)),
        ("vit_base_mci_224", {"depth": 1, "in_chans": 5}, (14, 14), (16, 16)),
    ],
)
def test_grids_at_native_sizes(name, options, grid, patch):
    model = import_timm().create_model(name, **options)
    adapter = adapt(model)
    size = model.patch_embed.img_size
    assert (adapter.grid(size), adapter.patch_size) == (grid, patch)
    assert adapter.in_chans == options.get("in_chans", 3)
    with pytest.raises(ValueError, match=r"images: expected \d+ x \d+ pixels for this model"):
        adapter.grid((2 * size[0], size[1]))


def test_native_sizes_of_transformers():
    """google/siglip-so400m-patch14-384 has 27 x 27 patches of 14 pixels, which leave a border of 6."""
    model = hf("siglip", "SiglipVisionModel", "SiglipVisionConfig", image_size=38, patch_size=14)
    adapter = adapt(model)
    assert (adapter.grid((38, 38)), adapter.patch_size) == ((2, 2), (14, 14))
    assert adapter.grid((42, 28)) == (3, 2)
    with pytest.raises(ValueError, match="multiples of the patch 14 x 14, got 40 x 40"):
        adapter.grid((40, 40))
    assert fastfg.residuals(model, torch.randn(1, 3, 38, 38), [0])[0].shape == (1, 4, 48)


@pytest.mark.parametrize(
    ("img_size", "embed", "message"),
    [
        (36, None, "an img_size that its convolutional stem divides evenly, got .36, 36."),
        (32, torch.nn.Conv2d(3, 48, 8, 8), "patch_embed to be timm's PatchEmbed or HybridEmbed, got Conv2d"),
    ],
)
def test_stems_that_are_not_supported(img_size, embed, message):
    model = timm_named("vitamin_small_224", img_size=img_size, embed_dim=384, depth=1)
    if embed is not None:
        model.patch_embed = embed
    with pytest.raises(ValueError, match=f"model: expected {message}"):
        adapt(model)


TOWERS = {
    "timm, num_classes=0": ("timm", lambda: timm_vit(num_classes=0)),
    "timm EVA, num_classes=0": ("timm", lambda: timm_eva(num_classes=0)),
    "transformers ViT": ("transformers", lambda: hf("vit", "ViTModel", "ViTConfig")),
    "transformers ViT, num_labels=0": (
        "transformers",
        lambda: hf("vit", "ViTForImageClassification", "ViTConfig", num_labels=0),
    ),
    "transformers DeiT": ("transformers", lambda: hf("deit", "DeiTModel", "DeiTConfig")),
    "transformers DINOv2": ("transformers", lambda: hf("dinov2", "Dinov2Model", "Dinov2Config")),
    "transformers CLIP": ("transformers", lambda: hf("clip", "CLIPVisionModel", "CLIPVisionConfig")),
    "transformers CLIP, projection": (
        "transformers",
        lambda: hf("clip", "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    ),
    "transformers SigLIP": ("transformers", lambda: hf("siglip", "SiglipVisionModel", "SiglipVisionConfig")),
    "torchvision, no head": ("torchvision", lambda: without_head(torchvision_vit())),
    "open_clip": ("open_clip", open_clip_tower),
    "vit-prisma, pre-logits": ("vit_prisma", lambda: hooked_vit(return_type="pre_logits", dtype=torch.float32)),
}


def without_head(model):
    model.heads.head = torch.nn.Identity()
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_no_classes_to_explain(name):
    library, builder = TOWERS[name]
    if library != "timm":
        pytest.importorskip(library)
    model = builder().float().eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(
        ValueError,
        match="target: expected fastfg.Target.similarity or a function of the model's output, .* got Target\\(None",
    ):
        fastfg.attribute(model, images)
    with pytest.raises(
        ValueError,
        match="target: expected fastfg.Target.similarity or a function of the model's output, .* got Target\\(1",
    ):
        fastfg.evaluate(model, images, torch.rand(2, 4, 4), target=1)
    adapter = adapt(model)
    check_target(adapter, fastfg.Target.similarity(torch.ones(48)))
    width = 48 if library != "open_clip" else 24
    assert adapter.logits(adapter.forward(images)).shape == (2, width if "projection" not in name else 512)
    assert fastfg.residuals(model, images, [1])[1].shape == (2, 16, 48)


def test_a_head_that_was_added_later():
    model = timm_vit(num_classes=0)
    model.head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(48, 3))
    assert adapt(model).has_logits
    model.head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Identity())
    assert not adapt(model).has_logits


def test_sizes_that_a_model_does_not_take():
    model, _, _ = setup("torchvision ViT")
    with pytest.raises(ValueError, match="images: expected 32 x 32 pixels for this model, got 40 x 32"):
        fastfg.attribute(model, torch.randn(1, 3, 40, 32).double())


def test_zero_shot_is_cosine_similarity():
    model, _, images = setup("open_clip zero-shot")
    features = F.normalize(model.visual(images), dim=-1)
    torch.testing.assert_close(model(images), 100 * features @ F.normalize(model.text_features, dim=-1).T)
    with pytest.raises(ValueError, match="text_features: expected width 24, .* got 5"):
        fastfg.models.ZeroShot(model.visual, torch.randn(7, 5).double())(images)
    for shape in ((24,), (1, 24)):
        with pytest.raises(
            ValueError, match=r"text_features: expected \[n, d\] with at least 2 classes, got \[(1, )?24\]"
        ):
            fastfg.models.ZeroShot(model.visual, torch.randn(shape))


def test_open_clips_timm_tower():
    pytest.importorskip("open_clip")
    from open_clip.timm_model import TimmModel

    torch.manual_seed(0)
    tower = TimmModel("test_vit", embed_dim=24, image_size=64, pool="", proj="linear", pretrained=False).eval()
    model = fastfg.models.ZeroShot(tower, torch.randn(7, 24))
    images = torch.randn(2, 3, 64, 64)
    result = fastfg.attribute(model, images)
    torch.testing.assert_close(result.logits, model(images).detach())
    assert result.maps.shape == (2, 4, 4)
