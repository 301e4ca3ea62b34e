"""The precision in which the model runs on perturbed images: float32, bfloat16, float16 or float8."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from fastfg.perturb import float8

PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": float8.FLOAT8,
}


def grown_rounding(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding makes in a model's output: it grows through the blocks."""
    eps = torch.finfo(dtype).eps
    return eps ** (0.5 if eps < 1e-5 else 0.6)


class Precision:
    """``float32`` (the model's own), ``bfloat16``, ``float16`` (both by autocast) or ``float8`` (linear layers).

    Raises ValueError for an unknown name, or a precision that ``device`` does not support.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if not isinstance(name, str) or name not in PRECISIONS:
            raise ValueError(f"precision: expected 'auto' or one of {tuple(PRECISIONS)}, got {name!r}")
        self.name, self.device, self.dtype = name, device, PRECISIONS[name]
        self._linear = float8.Float8Linear() if name == "float8" else None  # caches rounded weights
        if self._linear is not None and (reason := float8.why_not(device)) is not None:
            raise ValueError(f"precision: 'float8' is not available on {device}: {reason}")

    def eps(self, own: torch.dtype) -> float:
        """The relative rounding of this precision, for a model whose dtype is ``own``."""
        return torch.finfo(self.dtype or own).eps

    def __call__(self) -> AbstractContextManager[Any]:
        """A context for forwards in this precision."""
        stack = ExitStack()
        if self.dtype is not None:
            stack.enter_context(
                torch.autocast(self.device.type, self.dtype if self._linear is None else torch.bfloat16)
            )
        if self._linear is not None:
            stack.enter_context(self._linear)
        return stack
