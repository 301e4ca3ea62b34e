"""open_clip: its image tower, and the tower with text features as a zero-shot classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfg.models.adapter import CLASS_TOKEN, Adapter, fixed_or_multiple, pair

POOLS = {"tok": (CLASS_TOKEN,), "avg": (slice(1, None),)}


class ZeroShot(nn.Module):
    """A CLIP image tower and the text features of ``n`` classes, as a classifier of images.

    ``logits = logit_scale * normalise(visual(images)) @ normalise(text_features)^T``.

    Args:
        visual: open_clip's ``model.visual``, or any image tower of a known family whose output is the embedding.
        text_features: [n, d], ``model.encode_text`` of a prompt a class. logit_scale: CLIP's own is 100.
    """

    text_features: Tensor

    def __init__(self, visual: nn.Module, text_features: Tensor, logit_scale: float = 100.0) -> None:
        super().__init__()
        if text_features.ndim != 2:
            raise ValueError(f"text_features: expected [n, d], got {list(text_features.shape)}")
        self.visual, self.logit_scale = visual, logit_scale
        self.register_buffer("text_features", F.normalize(text_features.detach(), dim=-1))

    @property
    def trunk(self) -> nn.Module:
        """The transformer: the tower itself, or the timm model inside open_clip's ``TimmModel``."""
        trunk = getattr(self.visual, "trunk", None)
        return trunk if isinstance(trunk, nn.Module) else self.visual

    def forward(self, images: Tensor) -> Tensor:
        features = F.normalize(_embedding(self.visual(images)), dim=-1)
        if features.shape[-1] != self.text_features.shape[-1]:
            raise ValueError(
                f"text_features: expected width {features.shape[-1]}, as the image tower's, got "
                f"{self.text_features.shape[-1]}"
            )
        return self.logit_scale * features @ self.text_features.T


def _embedding(output: Any) -> Tensor:
    """The pooled embedding: alone, the first of (pooled, tokens), or a Hugging Face output's."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def adapt_zero_shot(model: ZeroShot, trunk: Adapter) -> Adapter:
    """The tower's adapter, with the whole classifier as the model."""
    return dataclasses.replace(trunk, model=model, forward=model)


def adapt(model: Any) -> Adapter:
    """The adapter of an ``open_clip.transformer.VisionTransformer``; its "logits" are the image embedding."""
    if getattr(model, "attn_pool_contrastive", None) is not None:
        raise ValueError("model: expected one pooling attention at most, got CoCa's two")
    if model.attn_pool is None and model.pool_type not in POOLS:
        raise ValueError(f"model: expected pool_type to be one of {tuple(POOLS)}, got {model.pool_type!r}")
    if not getattr(model.transformer, "batch_first", True):
        raise ValueError("model: expected batch_first=True, as open_clip builds it by default, got False")
    patch, size = pair(model.patch_size), pair(model.image_size)
    return Adapter(
        model=model,
        forward=lambda images: _embedding(model(images)),
        blocks=list(model.transformer.resblocks),
        num_prefix_tokens=1,
        grid=lambda given: fixed_or_multiple(given, patch, size),
        in_chans=model.conv1.in_channels,
        pooled=() if model.attn_pool is not None else POOLS[model.pool_type],
        later_attentions=int(model.attn_pool is not None),
        flags=((model.transformer, "grad_checkpointing", False),),
    )
