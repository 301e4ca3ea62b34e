"""open_clip: the image tower alone, or as a zero-shot classifier with text features."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfg.models.adapter import CLASS_TOKEN, Adapter, pair, patch_grid
from fastfg.targets import logits_of

POOLS = {"tok": (CLASS_TOKEN,), "avg": (slice(1, None),)}


class ZeroShot(nn.Module):
    """A CLIP image tower and the text features of ``n`` classes, as an image classifier.

    ``logits = logit_scale * normalise(visual(images)) @ normalise(text_features)^T``.

    Args:
        visual: open_clip's ``model.visual``, or any image tower of a known family whose output is the embedding.
        text_features: [n, d], n >= 2: for each class, ``model.encode_text`` of its prompt. A single text has no other
            class to compare with; explain its similarity with a target function on the tower instead.
        logit_scale: factor of the similarities; 100 in CLIP.

    Raises ValueError for text features of another shape.
    """

    text_features: Tensor

    def __init__(self, visual: nn.Module, text_features: Tensor, logit_scale: float = 100.0) -> None:
        super().__init__()
        if text_features.ndim != 2 or len(text_features) < 2:
            raise ValueError(
                f"text_features: expected [n, d] with at least 2 classes, got {list(text_features.shape)} (explain the "
                "similarity to one text with a target function on the image tower)"
            )
        self.visual, self.logit_scale = visual, logit_scale
        self.register_buffer("text_features", F.normalize(text_features.detach(), dim=-1))

    @property
    def trunk(self) -> nn.Module:
        """The transformer: the tower itself, or the timm model inside open_clip's ``TimmModel``."""
        trunk = getattr(self.visual, "trunk", None)
        return trunk if isinstance(trunk, nn.Module) else self.visual

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(_embedding(self.visual(images)))

    def classify(self, embedding: Tensor) -> Tensor:
        """The logits [B, n] of image embeddings [B, d]."""
        features = F.normalize(embedding, dim=-1)
        if features.shape[-1] != self.text_features.shape[-1]:
            raise ValueError(
                f"text_features: expected width {features.shape[-1]}, as the image tower's, got "
                f"{self.text_features.shape[-1]}"
            )
        return self.logit_scale * features @ self.text_features.T


def _embedding(output: Any) -> Tensor:
    """The pooled embedding: the output itself, the first of (pooled, tokens), or the field of a Hugging Face output."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def adapt_zero_shot(model: ZeroShot, trunk: Adapter) -> Adapter:
    """The tower's adapter, with the whole classifier as the model."""

    def forward(images: Tensor) -> Tensor:
        if model.trunk is not model.visual:  # a TimmModel, which adds a projection
            return model(images)
        return model.classify(trunk.logits(trunk.forward(images)))  # accepts the image sizes of the tower's family

    return dataclasses.replace(trunk, model=model, forward=forward, has_logits=True, logits=logits_of)


def adapt(model: Any) -> Adapter:
    """The adapter of an ``open_clip.transformer.VisionTransformer``, which returns the image embedding."""
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
        grid=lambda given: patch_grid(given, patch, size, only_native=True),
        in_chans=model.conv1.in_channels,
        pooled=() if model.attn_pool is not None else POOLS[model.pool_type],
        later_attentions=int(model.attn_pool is not None),
        flags=((model.transformer, "grad_checkpointing", False),),
        patch_size=patch,
        has_logits=False,
    )
