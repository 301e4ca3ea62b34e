"""``adam_topk``: one Adam step of a TopK SAE from its sparse codes. It changes the weights and their moments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_indices, check_shapes
from fastfg.ops.dispatch import choose, register, torch_op, without_gradient

CHANGED = ("weights", "m", "v")
LETTERS = {"W_enc": "d F", "b_enc": "F", "W_dec": "F d"}


@functools.partial(register, mutates=CHANGED)
def _adam_topk(
    x: Tensor,
    g: Tensor,
    values: Tensor,
    indices: Tensor,
    aux_g: Tensor | None,
    aux_values: Tensor | None,
    aux_indices: Tensor | None,
    weights: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    unit_norm: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1]), x.new_empty(weights[1].shape, dtype=torch.int32)


def adam_topk(
    x: Tensor,
    g: Tensor,
    values: Tensor,
    indices: Tensor,
    aux: tuple[Tensor, Tensor, Tensor] | None,
    weights: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    unit_norm: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of Adam for the encoder and the decoder of a TopK SAE, from the active features only.

    The gradients are those of a loss whose gradient at the reconstruction is ``g``: ``g W_dec`` at the active codes,
    ``values g`` for the decoder's rows, and their products with ``x`` for the encoder. Codes that are 0 have none. Adam
    is dense: rows without a gradient move by their moments, as in :class:`torch.optim.Adam`. Sums are in a fixed order,
    so results do not depend on the number of threads.

    Args:
        x: [T, d] float32 or float64, the encoder's input with ``b_dec`` already subtracted.
        g: [T, d] the gradient of the loss at the reconstruction.
        values: [T, K] codes after ReLU.
        indices: [T, K] int64, the features they belong to, from 0 to F - 1.
        aux: None, or ``(g, values, indices)`` of a second reconstruction from other features of the same tokens, with J
            features per token. Their gradients are added.
        weights: ``[W_enc, b_enc, W_dec]`` of sizes [d, F], [F] and [F, d], changed in place, with ``x``'s dtype.
            ``W_enc`` must have contiguous columns (``W_enc.mT`` is contiguous); the others are contiguous.
        m: the first moments, in the order, sizes and layouts of ``weights``; changed in place. Zeros at first.
        v: the second moments, likewise.
        lr: learning rate.
        step: the number of this step, from 1.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        unit_norm: the decoder's rows have norm 1. The part of a row's gradient along the row is removed before the
            step, and the norm is set to 1 after it.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``.

    Returns:
        The gradient at the encoder's input, summed over tokens [d]: minus the encoder's part of ``b_dec``'s gradient.
        And the number of tokens in which each feature is active [F] int32, without those of ``aux``.

    Raises:
        ValueError: for shapes, dtypes or layouts that don't fit, or ``step`` below 1.
        IndexError: for an index out of range. A Triton kernel can't raise: it leaves such pairs out.
        BackendError: if the named backend can't run; the message has every reason.

    Source: Adam of Kingma and Ba 2015; gradients and AuxK of Gao et al. 2024, arXiv 2406.04093.
    """
    sizes: dict[str, int] = {}
    check_shapes(sizes, x=(x, "T d"), g=(g, "T d"), values=(values, "T K"), indices=(indices, "T K"))
    aux_g, aux_values, aux_indices = aux or (None, None, None)
    check_shapes(sizes, aux_g=(aux_g, "T d"), aux_values=(aux_values, "T J"), aux_indices=(aux_indices, "T J"))
    for name, tensors in (("weights", weights), ("m", m), ("v", v)):
        _check_state(sizes, name, tensors, x)
    if isinstance(step, bool) or step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    chosen = choose("adam_topk", backend, x.device, x.dtype)
    codes = [without_gradient(t) for t in (x, g, values, indices, aux_g, aux_values, aux_indices)]
    state = [[without_gradient(t) for t in tensors] for tensors in (weights, m, v)]
    arguments: list[Any] = [*codes, *state, lr, *betas, eps, step, unit_norm]
    with torch.inference_mode(False), torch.no_grad():
        if chosen == "reference":
            check_indices(indices, sizes["F"])
            if aux_indices is not None:
                check_indices(aux_indices, sizes["F"], "aux_indices")
            return reference.adam_topk(*arguments)
        return torch_op("adam_topk", chosen)(*arguments)


def _check_state(sizes: dict[str, int], name: str, tensors: list[Tensor], x: Tensor) -> None:
    if len(tensors) != len(LETTERS):
        raise ValueError(f"{name}: expected [W_enc, b_enc, W_dec], got {len(tensors)} tensors")
    for (weight, letters), tensor in zip(LETTERS.items(), tensors, strict=True):
        check_shapes(sizes, **{f"{name}, {weight}": (tensor, letters)})
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}, {weight}: expected {x.dtype}, as x, got {tensor.dtype}")
        if not (tensor.mT if weight == "W_enc" else tensor).is_contiguous():
            layout = "contiguous columns" if weight == "W_enc" else "contiguous memory"
            raise ValueError(f"{name}, {weight}: expected {layout}, got strides {tensor.stride()}")
