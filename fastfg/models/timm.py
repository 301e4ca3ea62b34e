"""timm's VisionTransformer: any prefix tokens, LayerScale, class-token and mean pooling."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from fastfg.models.adapter import Adapter

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
    """The adapter of a ``timm.models.vision_transformer.VisionTransformer``."""
    if model.attn_pool is not None or model.global_pool not in POOLS:
        pool = "map" if model.attn_pool is not None else model.global_pool
        raise ValueError(f"model: expected global_pool to be one of {POOLS}, got {pool!r}")
    prefix = model.num_prefix_tokens
    start = 0 if model.pool_include_prefix else prefix
    config = getattr(model, "pretrained_cfg", None) or {}
    return Adapter(
        model=model,
        blocks=list(model.blocks),
        num_prefix_tokens=prefix,
        grid=lambda size: _grid(model, size),
        in_chans=model.in_chans,
        pooled=slice(0, 1) if model.global_pool == "token" else slice(start, None),
        pixel_mean=_channels(config.get("mean"), model.in_chans),
        pixel_std=_channels(config.get("std"), model.in_chans),
        flags=FLAGS,
    )


def preprocessing(model: Any) -> Callable[[Any], Tensor]:
    """The model's own evaluation transform: a PIL image -> [C, H, W], as timm's configuration of it says."""
    import_timm()
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({"input_size": (model.in_chans, *model.patch_embed.img_size)}, model=model)
    transform, mode = create_transform(**config), "L" if model.in_chans == 1 else "RGB"
    return lambda image: transform(image.convert(mode))


def _channels(values: Any, in_chans: int) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values is not None and len(values) == in_chans else None


def _grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    embed = model.patch_embed
    if embed.img_size is not None and not model.dynamic_img_size and tuple(size) != tuple(embed.img_size):
        raise ValueError(
            f"images: expected {embed.img_size[0]} x {embed.img_size[1]} pixels for this model, got "
            f"{size[0]} x {size[1]} (timm.create_model takes img_size= and dynamic_img_size=)"
        )
    (height, width), (ph, pw) = size, embed.patch_size
    if height % ph or width % pw:
        raise ValueError(f"images: expected sides that are multiples of the patch {ph} x {pw}, got {height} x {width}")
    return height // ph, width // pw
