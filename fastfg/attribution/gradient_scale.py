"""Keep the gradients of a float16 model in float16's range, which ends at 6e-8: below it they become 0.

The backward pass is linear, so the target is multiplied by a power of two per image, and what arrives is divided by it
in float32. The power brings the target's gradient at the model's output to ``2**exponent``. Gradients become smaller
on their way to the first block as a rule. For an image whose gradients overflow all the same, the passes are run again
with the next exponent. Other images keep theirs, so that no image depends on its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfg.targets import Target, map_tensors

EXPONENTS = (8, -2, -12)  # of the gradient at the output; float16 ends at 2**16
MOST = {torch.float16: 15}  # the largest power of a dtype; others have room for 100


class Exponents:
    """The exponent of each of ``n`` images, the first of :data:`EXPONENTS` to begin with."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._tried = torch.zeros(n, dtype=torch.long, device=device)

    @property
    def values(self) -> Tensor:
        return torch.tensor(EXPONENTS, device=self._tried.device)[self._tried]

    def lower(self, overflowed: Tensor) -> bool:
        """Give the ``overflowed`` [n] images their next exponent. Returns whether one of them has one."""
        again = overflowed & (self._tried < len(EXPONENTS) - 1)
        self._tried += again
        return bool(again.any())


def scale_of(y: Tensor, target: Target, output: Any, exponents: Exponents) -> Tensor:
    """The factor [B], float32, of the values ``y`` [B] of ``target``, by its gradient at the model's ``output``."""
    size = _gradient_size(target, output, len(y)).to(y.device)
    return power_of_two(size, exponents.values, MOST.get(y.dtype, 100))


def power_of_two(size: Tensor, exponent: int | Tensor, most: int = 100) -> Tensor:
    """The power of two [n] that brings each ``size`` [n] to at least ``2**exponent`` and below twice that.

    Its exponent is at most ``most``, of either sign. It is 1 for sizes that are 0 or not finite.
    """
    power = (exponent + 1 - torch.frexp(size).exponent).clamp(-most, most)
    usable = size.isfinite() & (size > 0)
    return torch.ldexp(torch.ones_like(size), torch.where(usable, power, 0))


def _gradient_size(target: Target, output: Any, n: int) -> Tensor:
    """The largest gradient per image [n], of a float32 copy of the output: in float16 it may be 0 or infinite."""
    copies: list[Tensor] = []

    def copied(t: Tensor) -> Tensor:
        if not t.is_floating_point() or not t.requires_grad:
            return t.detach()
        copies.append(t.detach().float().requires_grad_())
        return copies[-1]

    value = target.value(map_tensors(output, copied), n)
    if not copies or not value.requires_grad:
        return torch.ones(n)
    gradients = torch.autograd.grad(value.sum(), copies, allow_unused=True)
    sizes = [g.float().abs().flatten(1).amax(1) for g in gradients if g is not None and g.ndim and len(g) == n]
    return torch.stack(sizes).amax(0) if sizes else torch.ones(n)


def unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    """``gradient`` [B, ...] of the target itself, in float32 if it was scaled."""
    if scale is None:
        return gradient
    return gradient.float() / scale.reshape(-1, *[1] * (gradient.ndim - 1))


def gradient_at(x: Tensor, target: Target, output: Any) -> Tensor:
    """The gradient of ``target`` at ``x`` [B, ...], which ``output`` was made of; in float32 for a float16 model."""
    y = target.value(output, len(x))
    if x.dtype != torch.float16:
        return torch.autograd.grad(y.sum(), x)[0]
    exponents, is_nan = Exponents(len(x), x.device), y.detach().isnan()
    while True:
        scale = scale_of(y, target, output, exponents)
        found = unscaled(torch.autograd.grad(y, x, scale.to(y.dtype), retain_graph=True)[0], scale)
        if not exponents.lower(~found.isfinite().flatten(1).all(1) & ~is_nan):
            return found
