"""One Adam step of a TopK SAE: the gradients from its sparse codes, and the update of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg.reference.project import contributions

TILE = 2**22  # entries of gathered rows at a time, 16 MiB in float32


def topk_gradients(
    x: Tensor,  # [T, d], b_dec already subtracted
    g: Tensor,  # [T, d], the gradient of the loss at x_hat
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
    W_dec: Tensor,  # [F, d]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the loss for ``W_enc`` [d, F], ``b_enc`` [F] and ``W_dec`` [F, d], from the active features."""
    of_enc, of_dec, of_bias = torch.zeros_like(W_dec), torch.zeros_like(W_dec), torch.zeros_like(W_dec[:, 0])
    active = ~(values <= 0)  # the derivative of ReLU; NaN stays
    of_codes = torch.where(active, contributions(g, W_dec, torch.ones_like(values), indices), 0.0)
    of_bias.index_add_(0, indices.flatten(), of_codes.flatten())
    tokens = max(1, TILE // max(1, indices.shape[1] * x.shape[1]))
    for t in range(0, len(x), tokens):
        part = slice(t, t + tokens)
        rows = torch.where(active[part, :, None], values[part, :, None] * g[part, None], 0.0)
        of_dec.index_add_(0, indices[part].flatten(), rows.flatten(0, 1))
        of_enc.index_add_(0, indices[part].flatten(), (of_codes[part, :, None] * x[part, None]).flatten(0, 1))
    return of_enc.mT, of_bias, of_dec


def adam_topk(
    x: Tensor,  # [T, d], b_dec already subtracted
    g: Tensor,  # [T, d], the gradient of the loss at x_hat
    values: Tensor,  # [T, K]
    indices: Tensor,  # [T, K]
    aux_g: Tensor | None,  # [T, d], the gradient of the loss at the auxiliary reconstruction
    aux_values: Tensor | None,  # [T, J]
    aux_indices: Tensor | None,  # [T, J]
    weights: list[Tensor],  # W_enc [d, F], b_enc [F], W_dec [F, d]
    m: list[Tensor],  # first moments, as weights
    v: list[Tensor],  # second moments, as weights
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,  # 1 for the first
    unit_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Changes ``weights``, ``m`` and ``v``.

    Returns the gradient at the encoder's input, summed over tokens [d], and the number of tokens in which each feature
    is active [F].
    """
    W_enc, _, W_dec = weights
    gradients = list(topk_gradients(x, g, values, indices, W_dec))
    if aux_g is not None and aux_values is not None and aux_indices is not None:
        more = topk_gradients(x, aux_g, aux_values, aux_indices, W_dec)
        gradients = [a + b for a, b in zip(gradients, more, strict=True)]
    of_input = W_enc @ gradients[1]
    if unit_norm:  # without the part along the row, which would change its norm
        gradients[2] = gradients[2] - (gradients[2] * W_dec).sum(1, keepdim=True) * W_dec
    for weight, gradient, first, second in zip(weights, gradients, m, v, strict=True):
        first.mul_(beta1).add_((1 - beta1) * gradient)
        second.mul_(beta2).add_((1 - beta2) * gradient.square())
        step_size, root_correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
        weight.sub_(step_size * first / (second.sqrt() / root_correction + eps))
    if unit_norm:
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    counts = torch.zeros(len(W_dec), dtype=torch.int32, device=x.device)
    counts.index_add_(0, indices.flatten(), (~(values <= 0)).flatten().int())
    return of_input, counts
