"""vit-prisma's HookedViT: as it is, through its hook points, or turned into timm's VisionTransformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastfg.models.adapter import CLASS_TOKEN, Adapter, fixed_or_multiple, pair
from fastfg.models.timm import import_timm

if TYPE_CHECKING:
    from fastfg.capture import Capture

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
POOLED = {"cls": (CLASS_TOKEN,), "gaap": (slice(0, None),)}


def to_timm(hooked: Any) -> Any:
    """timm's VisionTransformer with the weights of ``hooked``, a ``vit_prisma.models.base_vit.HookedViT``.

    The same logits (pre-logits where ``return_type`` says so), with fused attention. Raises ValueError for
    variants that timm's model does not have.
    """
    config = hooked.cfg
    expected = {
        "normalization_type": "LN",
        "classification_type": "cls",
        "use_bert_block": False,
        "attn_only": False,
        "use_attn_scale": True,
        "is_video_transformer": False,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"hooked.cfg.{name}: expected {value!r}, got {getattr(config, name)!r}")
    if config.activation_name not in ACTIVATIONS:
        raise ValueError(
            f"hooked.cfg.activation_name: expected one of {tuple(ACTIVATIONS)}, got {config.activation_name!r}"
        )
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    pre_logits = config.return_type == "pre_logits"
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.n_channels,
        num_classes=0 if pre_logits else config.n_classes,
        embed_dim=config.d_model,
        depth=config.n_layers,
        num_heads=config.n_heads,
        mlp_ratio=config.d_mlp / config.d_model,
        pre_norm=config.layer_norm_pre,
        norm_layer=lambda width, **options: torch.nn.LayerNorm(width, eps=config.eps, **options),
        act_layer=ACTIVATIONS[config.activation_name],
    )
    if config.layer_norm_pre:  # timm leaves the patch bias out before a pre-norm
        model.patch_embed.proj.bias = torch.nn.Parameter(torch.zeros(config.d_model))
    model = model.to(config.dtype).eval()
    model.load_state_dict(_state(hooked.state_dict(), config, pre_logits))
    return model


def _state(source: dict[str, Tensor], config: Any, pre_logits: bool) -> dict[str, Tensor]:
    state = {
        "cls_token": source["cls_token"],
        "pos_embed": source["pos_embed.W_pos"].unsqueeze(0),
        "patch_embed.proj.weight": source["embed.proj.weight"],
        "patch_embed.proj.bias": source["embed.proj.bias"],
        "norm.weight": source["ln_final.w"],
        "norm.bias": source["ln_final.b"],
    }
    if config.layer_norm_pre:
        state |= {"norm_pre.weight": source["ln_pre.w"], "norm_pre.bias": source["ln_pre.b"]}
    if not pre_logits:
        state |= {"head.weight": source["head.W_H"].T, "head.bias": source["head.b_H"]}
    for block in range(config.n_layers):
        here = f"blocks.{block}"
        attn = {name: source[f"{here}.attn.{name}"] for name in ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V", "W_O")}
        # Prisma keeps [H, d, dh] a projection; timm one [3 H dh, d]
        weights = [attn[f"W_{n}"].permute(0, 2, 1).flatten(0, 1) for n in "QKV"]
        state |= {
            f"{here}.attn.qkv.weight": torch.cat(weights),
            f"{here}.attn.qkv.bias": torch.cat([attn[f"b_{n}"].flatten() for n in "QKV"]),
            f"{here}.attn.proj.weight": attn["W_O"].flatten(0, 1).T,
            f"{here}.attn.proj.bias": source[f"{here}.attn.b_O"],
            f"{here}.mlp.fc1.weight": source[f"{here}.mlp.W_in"].T,
            f"{here}.mlp.fc1.bias": source[f"{here}.mlp.b_in"],
            f"{here}.mlp.fc2.weight": source[f"{here}.mlp.W_out"].T,
            f"{here}.mlp.fc2.bias": source[f"{here}.mlp.b_out"],
        }
        for n in (1, 2):
            state |= {
                f"{here}.norm{n}.weight": source[f"{here}.ln{n}.w"],
                f"{here}.norm{n}.bias": source[f"{here}.ln{n}.b"],
            }
    return state


def adapt(model: Any) -> Adapter:
    """The adapter of a HookedViT as it is: its attention is met at its own hook points."""
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
        grid=lambda given: fixed_or_multiple(given, patch, size),
        in_chans=config.n_channels,
        pooled=POOLED[config.classification_type],
        meet=lambda capture: [h for block in model.blocks for h in _meet(block.attn, capture)],
    )


def _meet(attn: Any, capture: Capture) -> list[Any]:
    """Hooks on one attention's hook points: q, k, v on the way in, z (the heads' output) on the way out."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            if capture.mine():
                seen[name] = output.transpose(1, 2)  # [B, N, H, dh] -> [B, H, N, dh]

        return hook

    def leave(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if not capture.mine():
            return None
        q, k, v = seen.pop("q"), seen.pop("k"), seen.pop("v")
        return capture.meet(q, k, v, output, 1 / float(attn.attn_scale), transposed=True)

    hooks = [getattr(attn, f"hook_{name}").register_forward_hook(keep(name)) for name in "qkv"]
    return [*hooks, attn.hook_z.register_forward_hook(leave)]
