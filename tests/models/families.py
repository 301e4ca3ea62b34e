"""Small instances of every family, built by their own libraries with random weights."""

from __future__ import annotations

import importlib.util

import torch

from fastfg.models import ZeroShot
from fastfg.models.timm import import_timm

WIDE = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


def timm_vit(**options):
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**({"img_size": 32, "patch_size": 8} | WIDE | options))


def timm_deit():
    import_timm()
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(img_size=32, patch_size=8, **WIDE)


def timm_eva(**options):
    import_timm()
    from timm.models.eva import Eva

    return Eva(**({"img_size": 32, "patch_size": 8, "use_rot_pos_emb": True} | WIDE | options))


def timm_named(name, **options):
    """A registered architecture with fewer, narrower blocks."""
    shape = {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 4, "num_classes": 7}
    return import_timm().create_model(name, **(shape | options))


def hf(folder, name, config, **options):
    import transformers

    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    made = getattr(transformers, config)(**(shape | {"image_size": 32, "patch_size": 8, "num_labels": 7} | options))
    if name in ("CLIPForImageClassification", "SiglipForImageClassification"):
        whole = getattr(transformers, config.replace("Vision", ""))
        made = whole(vision_config=made.to_dict(), num_labels=7)
    return getattr(transformers, name)(made)


def torchvision_vit():
    import_timm()  # a torchvision that was built for another torch can't be imported directly
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=7)


def open_clip_tower(**options):
    import_timm()
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(32, 8, width=48, layers=3, heads=4, mlp_ratio=2.0, output_dim=24, **options)


def zero_shot(tower, width=24):
    return ZeroShot(tower, torch.randn(7, width), logit_scale=100.0)


def hooked_vit(**options):
    import_timm()
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.base_vit import HookedViT

    shape = {"n_layers": 3, "d_model": 48, "d_head": 12, "d_mlp": 96, "n_heads": 4, "n_classes": 7}
    shape |= {"image_size": 32, "patch_size": 8, "return_type": "class_logits", "dtype": torch.float64}
    model = HookedViT(HookedViTConfig(**(shape | options)))
    for name, parameter in model.named_parameters():
        if ".b_" in name:
            parameter.data.zero_()  # the library does not initialise some of them
    return model


# name: (library, builder, prefix tokens, what the head reads: slices of equal weight, or "pool")
CLS, ALL = slice(0, 1), slice(0, None)
FAMILIES = {
    "timm ViT": ("timm", timm_vit, 1, [CLS]),
    "timm ViT, registers": ("timm", lambda: timm_vit(reg_tokens=4), 5, [CLS]),
    "timm ViT, wide image": ("timm", lambda: timm_vit(img_size=(24, 40)), 1, [CLS]),
    "timm DeiT, distilled": ("timm", timm_deit, 2, [slice(0, 2)]),
    "timm DINOv2": (
        "timm",
        lambda: timm_named("vit_small_patch14_dinov2", dynamic_img_size=True, patch_size=8),
        1,
        [CLS],
    ),
    "timm DINOv2, registers": ("timm", lambda: timm_named("vit_small_patch14_reg4_dinov2", patch_size=8), 5, [CLS]),
    "timm DINOv3": ("timm", lambda: timm_named("vit_small_patch16_dinov3"), 5, [slice(5, None)]),
    "timm EVA": ("timm", timm_eva, 1, [slice(1, None)]),
    "timm EVA, class token": ("timm", lambda: timm_eva(global_pool="token", swiglu_mlp=True, scale_mlp=True), 1, [CLS]),
    "timm SigLIP": ("timm", lambda: timm_named("vit_base_patch16_siglip_224"), 0, "pool"),
    "timm CLIP": ("timm", lambda: timm_named("vit_base_patch16_clip_224"), 1, [CLS]),
    "transformers ViT": ("transformers", lambda: hf("vit", "ViTForImageClassification", "ViTConfig"), 1, [CLS]),
    "transformers DeiT": ("transformers", lambda: hf("deit", "DeiTForImageClassification", "DeiTConfig"), 2, [CLS]),
    "transformers DeiT, teacher": (
        "transformers",
        lambda: hf("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        2,
        [slice(0, 2)],
    ),
    "transformers DINOv2": (
        "transformers",
        lambda: hf("dinov2", "Dinov2ForImageClassification", "Dinov2Config"),
        1,
        [CLS, slice(1, None)],
    ),
    "transformers CLIP": (
        "transformers",
        lambda: hf("clip", "CLIPForImageClassification", "CLIPVisionConfig"),
        1,
        [slice(1, None)],
    ),
    "zero-shot over transformers' CLIPVisionModel": (
        "transformers",
        lambda: zero_shot(hf("clip", "CLIPVisionModel", "CLIPVisionConfig"), 48),
        1,
        [CLS],
    ),
    "zero-shot over transformers' CLIP with projection": (
        "transformers",
        lambda: zero_shot(hf("clip", "CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=24)),
        1,
        [CLS],
    ),
    "transformers SigLIP": (
        "transformers",
        lambda: hf("siglip", "SiglipForImageClassification", "SiglipVisionConfig"),
        0,
        [ALL],
    ),
    "zero-shot over transformers' SigLIP, pooling head": (
        "transformers",
        lambda: zero_shot(hf("siglip", "SiglipVisionModel", "SiglipVisionConfig"), 48),
        0,
        "pool",
    ),
    "torchvision ViT": ("torchvision", torchvision_vit, 1, [CLS]),
    "open_clip zero-shot, attention pooling": (
        "open_clip",
        lambda: zero_shot(open_clip_tower(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5)),
        1,
        "pool",
    ),
    "open_clip zero-shot": ("open_clip", lambda: zero_shot(open_clip_tower()), 1, [CLS]),
    "zero-shot over a timm tower": ("timm", lambda: zero_shot(timm_vit(num_classes=24)), 1, [CLS]),
    "vit-prisma HookedViT": ("vit_prisma", hooked_vit, 1, [CLS]),
}


# convolutional stems; if their convolutions overlap, a perturbed patch also changes its neighbours' tokens
HYBRIDS = {
    "timm hybrid, ResNet stem": ("timm", lambda: timm_named("vit_tiny_r_s16_p8_224"), 1, [CLS]),
    "timm ViTamin": ("timm", lambda: timm_named("vitamin_small_224", img_size=32, embed_dim=384, depth=2), 0, [ALL]),
    "timm MobileCLIP-B": (
        "timm",
        lambda: timm_named("vit_base_mci_224", img_size=32, embed_dim=768, depth=2),
        1,
        [CLS],
    ),
}


def build(name):
    """The instance in float64, with weights that make its attention far from uniform."""
    library, builder, _, _ = (FAMILIES | HYBRIDS)[name]
    if importlib.util.find_spec(library) is None:
        import pytest

        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    model = builder().double().eval()
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            width = parameter[0].numel() if parameter.ndim == 2 else parameter.shape[-1]
            parameter.data.normal_(0, 1.3 * width**-0.5, generator=random)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.1)
    return model
