"""Linear layers in 8 bits, an opt-in for perturbed forwards.

Each row is scaled so that its largest number becomes the largest float8 (e4m3). The input is rounded in every call, the
weight once. Products are summed in float32 and returned in bfloat16. On a GPU with 8-bit matrix units (compute
capability 9.0 or higher) this is one scaled product. A CPU multiplies the same numbers in float32: that shows the
effect on a metric but saves no time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfg.torch_internals import scaled_mm

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
MULTIPLE = 16  # both sides of a weight must be multiples of it for the matrix unit


def why_not(device: torch.device) -> str | None:
    """The reason why ``device`` can neither multiply in float8 nor emulate it, or None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"float8 rows need compute capability 9.0, and {torch.cuda.get_device_name(device)} has less"
    return None


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [n, d] as float8 numbers and one scale per row [n, 1]: ``x = numbers * scale``, up to rounding."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(FLOAT8), scale


class Float8Linear(TorchFunctionMode):
    """While active in this thread, ``F.linear`` multiplies in float8 if the weight's sides are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by id of the weight: the weight, numbers, scale

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
            return F.linear(input, weight, bias)
        if id(weight) not in self._weights:
            self._weights[id(weight)] = (weight, *rounded(weight))
        _, W, W_scale = self._weights[id(weight)]
        x, x_scale = rounded(input.flatten(0, -2))
        if input.is_cuda:
            out = scaled_mm(x, W.mT, x_scale, W_scale.mT)
        else:
            out = ((x.float() @ W.float().mT) * x_scale * W_scale.mT).bfloat16()
        out = out.unflatten(0, input.shape[:-1])
        return out if bias is None else out + bias.bfloat16()
