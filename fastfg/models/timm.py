"""timm: VisionTransformer and Eva, with class-token, mean and attention pooling, registers, rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from fastfg.models.adapter import CLASS_TOKEN, Adapter, fixed_or_multiple

POOLS = ("token", "avg")
FLAGS = {"fused_attn": True, "grad_checkpointing": False}  # a checkpointed block would run twice


def import_timm() -> ModuleType:
    """timm, also where torchvision was built for another torch and its operators are missing.

    timm imports torchvision, whose fake kernels need the schemas of ``nms`` and ``qnms``. On a CPU-only torch
    the torchvision of PyPI fails with "operator torchvision::nms does not exist"; declaring them mends that.
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
    """The adapter of a timm ``VisionTransformer`` (also DeiT with its distillation token) or ``Eva`` (DINOv3, EVA)."""
    prefix = model.num_prefix_tokens
    config = getattr(model, "pretrained_cfg", None) or {}
    embed = model.patch_embed
    fixed = None if embed.img_size is None or model.dynamic_img_size else embed.img_size
    hint = " (timm.create_model takes img_size= and dynamic_img_size=)"
    in_chans = embed.proj.in_channels
    return Adapter(
        model=model,
        forward=model,
        blocks=list(model.blocks),
        num_prefix_tokens=prefix,
        grid=lambda size: fixed_or_multiple(size, embed.patch_size, fixed, hint),
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
    )


def _pooled(model: Any, prefix: int) -> tuple[slice, ...]:
    if model.attn_pool is not None:
        return ()
    if model.global_pool not in POOLS:
        raise ValueError(f"model: expected global_pool to be one of {(*POOLS, 'map')}, got {model.global_pool!r}")
    if hasattr(model, "head_dist"):
        return (slice(0, 2),)  # the mean of the class head's and the distillation head's logits
    if model.global_pool == "token":
        return (CLASS_TOKEN,)
    return (slice(0 if getattr(model, "pool_include_prefix", False) else prefix, None),)


def preprocessing(model: Any) -> Callable[[Any], Tensor]:
    """The model's own evaluation transform: a PIL image -> [C, H, W], as timm's configuration of it says."""
    import_timm()
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(
        {"input_size": (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)}, model=model
    )
    transform, mode = create_transform(**config), "L" if model.patch_embed.proj.in_channels == 1 else "RGB"
    return lambda image: transform(image.convert(mode))


def _channels(values: Any, in_chans: int) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values is not None and len(values) == in_chans else None
