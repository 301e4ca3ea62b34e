"""Converts a HookedViT to timm's VisionTransformer, as the oracle for the HookedViT adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfg.models.timm import import_timm

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def to_timm(hooked: Any) -> Any:
    """timm's VisionTransformer with the weights of ``hooked``, a ``vit_prisma.models.base_vit.HookedViT``.

    It returns the same logits (pre-logits if ``return_type`` says so), with fused attention. Raises ValueError for
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
        # Prisma has one [H, d, dh] per projection; timm has one [3 H dh, d] for all three
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
