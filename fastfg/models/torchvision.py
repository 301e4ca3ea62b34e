"""torchvision's VisionTransformer (``vit_b_16`` and its other sizes)."""

from __future__ import annotations

from typing import Any

from fastfg.models.adapter import CLASS_TOKEN, Adapter, is_head, pair, patch_grid


def adapt(model: Any) -> Adapter:
    """The adapter of a ``torchvision.models.vision_transformer.VisionTransformer``."""
    patch, size = pair(model.patch_size), pair(model.image_size)
    return Adapter(
        model=model,
        forward=model,
        blocks=list(model.encoder.layers),
        num_prefix_tokens=1,
        grid=lambda given: patch_grid(given, patch, size, only_native=True),
        in_chans=next(model.conv_proj.parameters()).shape[1] if hasattr(model, "conv_proj") else 3,
        pooled=(CLASS_TOKEN,),
        patch_size=patch,
        has_logits=is_head(model.heads),
    )
