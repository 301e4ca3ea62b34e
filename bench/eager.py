"""The method in plain torch for timm's ViT, to compare ``fastfg.attribute`` with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastfg import Gate, SparseAutoencoder, reference

TARGET = 1  # one class for every provider and precision


def own(model: nn.Module, images: Tensor) -> None:
    """The model's forward pass and the backward pass of its activations."""
    with torch.enable_grad():
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)


@contextmanager
def unfused(model: nn.Module, layers: Sequence[int]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Switch fused attention off; yields two lists that the next forward fills: all attention maps, and residuals."""
    maps: list[Tensor] = []
    residuals: list[Tensor] = []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda m, i, o: maps.append(o)) for block in model.blocks]
    hooks += [model.blocks[layer].register_forward_hook(lambda m, i, o: residuals.append(o)) for layer in layers]
    for block in model.blocks:
        block.attn.fused_attn = False
    try:
        yield maps, residuals
    finally:
        for hook in hooks:
            hook.remove()
        for block in model.blocks:
            block.attn.fused_attn = True


def gates_of(scores: Tensor, configs: Sequence[Gate]) -> Tensor:
    """Gates [C, B, N] from the scores [B, P] of one block."""
    gates = torch.stack([reference.gate(scores, config.kappa, config.c_max) for config in configs])
    return nn.functional.pad(gates, (1, 0), value=1.0)


def kept_maps(
    model: nn.Module, images: Tensor, saes: Mapping[int, SparseAutoencoder], configs: Sequence[Gate | None]
) -> Tensor:
    """Batched, with all maps and their gradients stored; sparse codes and the row form, as in fastfg."""
    layers = sorted(saes)
    with torch.enable_grad(), unfused(model, layers) as (maps, residuals):
        y = model(images.clone().requires_grad_())[:, TARGET].sum()
        gradients = torch.autograd.grad(y, [*maps, *residuals])
    dmaps, dresiduals = gradients[: len(maps)], gradients[len(maps) :]
    gates = {
        layer: gates_of(_score(saes[layer], x[:, 1:], g[:, 1:]).float(), configs)
        for layer, x, g in zip(layers, residuals, dresiduals, strict=True)
    }
    rows = torch.zeros(len(configs), len(images), maps[0].shape[-1], device=images.device)
    rows[..., 0] = 1
    for block in reversed(range(len(maps))):
        E = reference.attention_map(maps[block], dmaps[block]).float()
        rows = rows + torch.einsum("cbn,bnm->cbm", rows, E) * gates.get(block, 1)
    return rows[..., 1:]


def _score(sae: SparseAutoencoder, x: Tensor, g: Tensor) -> Tensor:
    """The scores [B, P] of a block's patches."""
    if sae.k is None:
        return reference.project_dense(g, sae.W_dec, sae.encode(x))
    pre = reference.preactivations(sae.normalize(x).values.flatten(0, 1), sae.W_enc, sae.b_enc, sae.subtracted)
    values, indices = pre.topk(sae.k)
    decoded = nn.functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values.relu(), mode="sum")
    return (g * decoded.unflatten(0, g.shape[:2])).sum(-1)


def authors_way(
    model: nn.Module, images: Tensor, saes: Mapping[int, SparseAutoencoder], configs: Sequence[Gate | None]
) -> Tensor:
    """Like the author's program: single images, maps copied to the CPU, dense codes and ``D^T g``, N x N relevancy."""
    return torch.stack([_authors_image(model, image[None], saes, configs[0]) for image in images])[None]


def _authors_image(
    model: nn.Module, image: Tensor, saes: Mapping[int, SparseAutoencoder], config: Gate | None
) -> Tensor:
    layers = sorted(saes)
    with torch.enable_grad(), unfused(model, layers) as (maps, residuals):
        leaf = image.clone().requires_grad_()
        gradients = torch.autograd.grad(model(leaf)[0, TARGET], [*maps, *residuals, leaf])
    gates: list[Tensor | None] = [None] * len(maps)
    for layer, x, g in zip(layers, residuals, gradients[len(maps) : -1], strict=True):
        sae = saes[layer]
        scores = reference.project_dense(g[:, 1:], sae.W_dec, sae.encode(x[:, 1:])).float().cpu()
        assert config is not None
        gates[layer] = gates_of(scores, [config])[0]
    A, dA = ([t.float().cpu() for t in group] for group in (maps, gradients[: len(maps)]))
    return reference.relevancy_matrix(A, dA, gates)[0, 0, 1:]
