"""Hugging Face transformers: ViT, DeiT, DINOv2, CLIP and SigLIP vision models."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastfg.models.adapter import CLASS_TOKEN, Adapter, fixed_or_multiple, pair


class Family(NamedTuple):
    """Prefix tokens, what the head reads, and where the logits are in the output."""

    prefix: int
    pooled: tuple[slice, ...]
    output: str = "logits"
    interpolates: str = "asked"  # position embedding of other sizes: when "asked" to, "always" or "never"


FAMILIES = {
    "vit.modeling_vit.ViTForImageClassification": Family(1, (CLASS_TOKEN,)),
    "deit.modeling_deit.DeiTForImageClassification": Family(2, (CLASS_TOKEN,)),
    "deit.modeling_deit.DeiTForImageClassificationWithTeacher": Family(2, (slice(0, 2),)),
    "dinov2.modeling_dinov2.Dinov2ForImageClassification": Family(
        1, (CLASS_TOKEN, slice(1, None)), interpolates="always"
    ),
    "clip.modeling_clip.CLIPForImageClassification": Family(1, (slice(1, None),)),
    "clip.modeling_clip.CLIPVisionModel": Family(1, (CLASS_TOKEN,), "pooler_output"),
    "clip.modeling_clip.CLIPVisionModelWithProjection": Family(1, (CLASS_TOKEN,), "image_embeds"),
    "siglip.modeling_siglip.SiglipForImageClassification": Family(0, (slice(0, None),)),
    "siglip.modeling_siglip.SiglipVisionModel": Family(0, (), "pooler_output"),
}


def adapt(model: Any) -> Adapter:
    """The adapter of one of :data:`FAMILIES`. Its attention is met as SDPA, whatever it is set to."""
    family = next(
        FAMILIES[name]
        for cls in type(model).__mro__
        if (name := f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models.")) in FAMILIES
    )
    config = getattr(model.config, "vision_config", model.config)
    heads = [m for m in model.modules() if type(m).__name__ == "SiglipMultiheadAttentionPoolingHead"]
    if not family.pooled and not heads:
        raise ValueError("model: expected its attention-pooling head, got vision_use_head=False")
    patch, native = pair(config.patch_size), pair(config.image_size)

    def forward(images: Tensor) -> Tensor:
        other = (images.shape[-2], images.shape[-1]) != native
        options = {"interpolate_pos_encoding": True} if other and family.interpolates == "asked" else {}
        return getattr(model(pixel_values=images, **options), family.output)

    return Adapter(
        model=model,
        forward=forward,
        blocks=_blocks(model, config.num_hidden_layers),
        num_prefix_tokens=family.prefix,
        grid=lambda size: fixed_or_multiple(size, patch, native if family.interpolates == "never" else None),
        in_chans=config.num_channels,
        pooled=family.pooled,
        later_attentions=len(heads),
        flags=tuple((c, "_attn_implementation", "sdpa") for c in _configs(model)),
    )


def _blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    """The list of ``depth`` layers that attend; its name differs from version to version."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ValueError(f"model: expected one list of {depth} layers, as its config says, got {len(found)}")
    return list(found[0])


def _configs(model: nn.Module) -> list[Any]:
    """The configs that the attention layers look their implementation up in, each once."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in configs.values() if hasattr(c, "_attn_implementation")]
