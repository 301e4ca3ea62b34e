"""vit-prisma's HookedViT: its attention is read at its own hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fastfg.models.adapter import CLASS_TOKEN, Adapter, MeetsAttention, pair, patch_grid
from fastfg.models.hooks import in_this_thread

POOLED = {"cls": (CLASS_TOKEN,), "gaap": (slice(0, None),)}


def adapt(model: Any) -> Adapter:
    """The adapter of a vit-prisma ``HookedViT``. Raises ValueError for video models, BERT blocks and other poolings."""
    config = model.cfg
    if config.use_bert_block or config.is_video_transformer or config.classification_type not in POOLED:
        raise ValueError(
            f"model: expected an image model with classification_type in {tuple(POOLED)} and no BERT blocks, got "
            f"{config.classification_type!r}"
        )
    prefix = int(config.classification_type == "cls")
    patch, size = pair(config.patch_size), pair(config.image_size)
    return Adapter(
        model=model,
        forward=model,
        blocks=list(model.blocks),
        num_prefix_tokens=prefix,
        grid=lambda given: patch_grid(given, patch, size, only_native=True),
        in_chans=config.n_channels,
        pooled=POOLED[config.classification_type],
        meet=lambda capture: (handle for block in model.blocks for handle in _meet(block.attn, capture)),
        patch_size=patch,
        has_logits=config.return_type != "pre_logits",
    )


def _meet(attn: Any, capture: MeetsAttention) -> Iterator[Any]:
    """Register hooks on one attention's hook points: q, k and v before it, z (the heads' output) after it."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen[name] = output.transpose(1, 2)  # [B, N, H, dh] -> [B, H, N, dh]

        return hook

    def leave(module: Any, inputs: Any, output: Tensor) -> Tensor:
        q, k, v = seen.pop("q"), seen.pop("k"), seen.pop("v")
        return capture.meet(q, k, v, output, 1 / float(attn.attn_scale), transposed=True)

    for name in "qkv":
        yield getattr(attn, f"hook_{name}").register_forward_hook(in_this_thread(keep(name)))
    yield attn.hook_z.register_forward_hook(in_this_thread(leave))
