"""Hugging Face transformers: ViT, DeiT, DINOv2, CLIP and SigLIP, as classifiers or as towers without a class head."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastfg.models.adapter import CLASS_TOKEN, Adapter, is_head, pair, patch_grid


class Family(NamedTuple):
    """Prefix tokens, the tokens that the head reads, and the field of the output that is explained."""

    prefix: int
    pooled: tuple[slice, ...]
    output: str = "logits"
    asks: bool = True  # other image sizes need interpolate_pos_encoding=True; False: they are always interpolated


FAMILIES = {
    "vit.modeling_vit.ViTForImageClassification": Family(1, (CLASS_TOKEN,)),
    "vit.modeling_vit.ViTModel": Family(1, (CLASS_TOKEN,), "pooler_output"),
    "deit.modeling_deit.DeiTForImageClassification": Family(2, (CLASS_TOKEN,)),
    "deit.modeling_deit.DeiTForImageClassificationWithTeacher": Family(2, (slice(0, 2),)),
    "deit.modeling_deit.DeiTModel": Family(2, (CLASS_TOKEN,), "pooler_output"),
    "dinov2.modeling_dinov2.Dinov2ForImageClassification": Family(1, (CLASS_TOKEN, slice(1, None)), asks=False),
    "dinov2.modeling_dinov2.Dinov2Model": Family(1, (CLASS_TOKEN,), "pooler_output", asks=False),
    "clip.modeling_clip.CLIPForImageClassification": Family(1, (slice(1, None),)),
    "clip.modeling_clip.CLIPVisionModel": Family(1, (CLASS_TOKEN,), "pooler_output"),
    "clip.modeling_clip.CLIPVisionModelWithProjection": Family(1, (CLASS_TOKEN,), "image_embeds"),
    "siglip.modeling_siglip.SiglipForImageClassification": Family(0, (slice(0, None),)),
    "siglip.modeling_siglip.SiglipVisionModel": Family(0, (), "pooler_output"),
}
HEADS = ("classifier", "cls_classifier")  # names of the class head, if a model has one


def adapt(model: Any) -> Adapter:
    """The adapter of one of :data:`FAMILIES`. Its attention runs as SDPA, even if another implementation is set."""
    family = next(
        FAMILIES[name]
        for cls in type(model).__mro__
        if (name := f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models.")) in FAMILIES
    )
    config = getattr(model.config, "vision_config", model.config)
    poolers = [m for m in model.modules() if type(m).__name__ == "SiglipMultiheadAttentionPoolingHead"]
    if not family.pooled and not poolers:
        raise ValueError("model: expected its attention-pooling head, got vision_use_head=False")
    patch, native = pair(config.patch_size), pair(config.image_size)

    def forward(images: Tensor) -> Any:
        other = (images.shape[-2], images.shape[-1]) != native
        options = {"interpolate_pos_encoding": True} if other and family.asks else {}
        return model(pixel_values=images, **options)

    return Adapter(
        model=model,
        forward=forward,
        blocks=_blocks(model, config.num_hidden_layers),
        num_prefix_tokens=family.prefix,
        grid=lambda size: patch_grid(size, patch, native),
        in_chans=config.num_channels,
        pooled=family.pooled,
        later_attentions=len(poolers),
        flags=tuple((c, "_attn_implementation", "sdpa") for c in _configs(model)),
        patch_size=patch,
        logits=operator.attrgetter(family.output),
        has_logits=any(is_head(getattr(model, name)) for name in HEADS if hasattr(model, name)),
    )


def _blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    """The list of ``depth`` transformer layers, found by its length: its name differs between versions."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ValueError(f"model: expected one list of {depth} layers, as its config says, got {len(found)}")
    return list(found[0])


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configs in which the attention layers look up their implementation."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in configs.values() if hasattr(c, "_attn_implementation")]
