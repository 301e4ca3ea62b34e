"""timm: VisionTransformer and Eva, with class-token, mean and attention pooling, registers and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastfg.models.adapter import CLASS_TOKEN, Adapter, is_head, pair, patch_grid

POOLS = ("token", "avg")
FLAGS = {"fused_attn": True, "grad_checkpointing": False}  # checkpointing would run each block twice


def import_timm() -> ModuleType:
    """Import ``timm``, even if torchvision was built for another torch and its operators are missing.

    timm imports torchvision, and torchvision registers fake kernels for its operators ``nms`` and ``qnms``. On a
    CPU-only torch the torchvision of PyPI can't load these operators, and its import fails with "operator
    torchvision::nms does not exist". This function then declares their schemas, and the import succeeds. The models
    need none of these operators. After this call, ``import timm`` and ``import torchvision`` succeed too.
    """
    try:
        import timm
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _declare_torchvision_operators()
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; install fastfg with its timm extra: pip install 'fastfg[timm]'") from None
    return timm


def _declare_torchvision_operators() -> None:
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def adapt(model: Any) -> Adapter:
    """The adapter of a timm ``VisionTransformer`` or ``Eva``.

    ``VisionTransformer`` includes DeiT with its distillation token, DINOv2, SigLIP, CLIP, and hybrids with a
    convolutional stem (ViT-ResNet, ViTamin, MobileCLIP-B). ``Eva`` includes DINOv3 and EVA. Raises ValueError for
    poolings other than class token, mean and attention, and for an unknown patch embedding.
    """
    prefix = model.num_prefix_tokens
    config = getattr(model, "pretrained_cfg", None) or {}
    patch, in_chans = _patch(model.patch_embed)
    native = None if model.dynamic_img_size else model.patch_embed.img_size
    hint = " (timm.create_model takes img_size= and dynamic_img_size=)"
    return Adapter(
        model=model,
        forward=model,
        blocks=list(model.blocks),
        num_prefix_tokens=prefix,
        grid=lambda size: patch_grid(size, patch, native, only_native=True, hint=hint),
        in_chans=in_chans,
        pooled=_pooled(model, prefix),
        later_attentions=int(model.attn_pool is not None),
        pixel_mean=_channels(config.get("mean"), in_chans),
        pixel_std=_channels(config.get("std"), in_chans),
        flags=tuple(
            (module, name, value)
            for module in model.modules()
            for name, value in FLAGS.items()
            if name in module.__dict__
        ),
        patch_size=patch,
        has_logits=is_head(model.head),
    )


def _patch(embed: Any) -> tuple[tuple[int, int], int]:
    """The patch size in pixels and the number of input channels, from timm's ``PatchEmbed`` or ``HybridEmbed``."""
    if isinstance(getattr(embed, "proj", None), nn.Conv2d) and not hasattr(embed, "backbone"):
        return pair(embed.patch_size), embed.proj.in_channels
    if not hasattr(embed, "feature_ratio"):
        raise ValueError(
            f"model: expected patch_embed to be timm's PatchEmbed or HybridEmbed, got {type(embed).__name__}"
        )
    patch = pair(embed.feat_ratio(as_scalar=False))  # the stem's reduction times the patch on its features
    # timm divides the image by the stem's features. If the last feature is cut off, the result is no power of two.
    uneven = [ratio for ratio in pair(embed.feature_ratio) if ratio & (ratio - 1)]
    if uneven or embed.img_size[0] % patch[0] or embed.img_size[1] % patch[1]:
        raise ValueError(
            f"model: expected an img_size that its convolutional stem divides evenly, got {tuple(embed.img_size)}"
        )
    return patch, embed.in_chans


def _pooled(model: Any, prefix: int) -> tuple[slice, ...]:
    if model.attn_pool is not None:
        return ()
    if model.global_pool not in POOLS:
        raise ValueError(
            f"model: expected global_pool to be one of {(*POOLS, 'map', 'prr')}, got {model.global_pool!r}"
        )
    if hasattr(model, "head_dist"):
        return (slice(0, 2),)  # the mean of the class head's and the distillation head's logits
    if model.global_pool == "token":
        return (CLASS_TOKEN,)
    return (slice(0 if getattr(model, "pool_include_prefix", False) else prefix, None),)


def preprocessing(model: Any) -> Callable[[Any], Tensor]:
    """The evaluation transform of a timm model, made from its timm configuration: a PIL image -> [C, H, W].

    Raises ValueError if the configuration normalises another number of channels than the model takes.
    """
    import_timm()
    from timm.data import create_transform, resolve_data_config

    embed = model.patch_embed
    _, in_chans = _patch(embed)
    options = {} if embed.img_size is None else {"input_size": (in_chans, *embed.img_size)}
    config = resolve_data_config(options, model=model)
    if len(config["mean"]) != in_chans:
        raise ValueError(
            f"model: expected a mean for each of its {in_chans} input channels in pretrained_cfg, got {config['mean']}"
        )
    return Converted(create_transform(**config), "L" if in_chans == 1 else "RGB")


class Converted:
    """A transform of PIL images that gets them in one mode. It can be pickled, for processes that read images."""

    def __init__(self, transform: Callable[[Any], Tensor], mode: str) -> None:
        self.transform, self.mode = transform, mode

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image.convert(self.mode))


def _channels(values: Any, in_chans: int) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values is not None and len(values) == in_chans else None
