"""Keep the gradients of a float16 model in float16's range, which ends at 6e-8: below it they become 0.

The backward pass is linear, so the target is multiplied by a power of two per image, and what arrives is divided by it
in float32. The power brings the target's gradient at the model's output to ``2**exponent``. Gradients become smaller
on their way to the first block as a rule. Where they overflow all the same, the passes are run again with the next
exponent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXPONENTS = (8, -2, -12)  # of the gradient at the output; float16 ends at 2**16
MOST = {torch.float16: 15}  # the largest power of a dtype; others have room for 100


def scale_of(y: Tensor, output: Any, exponent: int) -> Tensor:
    """The factor [B], float32, of the targets ``y`` [B], which were computed from the model's ``output``."""
    size = torch.ones(len(y), dtype=torch.float32, device=y.device)
    if isinstance(output, Tensor) and output.requires_grad and y.requires_grad:
        (g,) = torch.autograd.grad(y.sum(), output, retain_graph=True, allow_unused=True)
        if g is not None and len(g) == len(y):
            size = g.float().abs().flatten(1).amax(1)
    most = MOST.get(y.dtype, 100)
    power = (exponent - torch.frexp(size).exponent + 1).clamp(-most, most)
    usable = size.isfinite() & (size > 0)
    return torch.ldexp(torch.ones_like(size), torch.where(usable, power, 0))


def unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    """``gradient`` [B, ...] of the target itself, in float32 if it was scaled."""
    if scale is None:
        return gradient
    return gradient.float() / scale.reshape(-1, *[1] * (gradient.ndim - 1))


def gradient_at(x: Tensor, y: Tensor, output: Any) -> Tensor:
    """The gradient of the targets ``y`` [B] at ``x`` [B, ...], in float32 for a float16 model."""
    if x.dtype != torch.float16:
        return torch.autograd.grad(y.sum(), x)[0]
    for exponent in EXPONENTS:
        scale = scale_of(y, output, exponent)
        found = unscaled(torch.autograd.grad(y, x, scale.to(y.dtype), retain_graph=True)[0], scale)
        if bool(found.isfinite().all()):
            break
    return found
