"""Perturb pixels: the model runs on the perturbed images themselves. This works for any callable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.precision import Precision

Forward = Callable[[Tensor], Any]


class Pixels:
    """The reference path, and the only one for models of no known family.

    Args:
        forward: images [n, C, H, W] -> the model's output. grid: where the patches lie.
        precision: a context for the forward passes (see ``Precision``); None: the model's own.
    """

    def __init__(self, forward: Forward, grid: PatchGrid, precision: Precision | None = None) -> None:
        self.forward, self.grid, self.precision = forward, grid, precision

    def prepare(self, images: Tensor, fills: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return images, fills

    def buffers(self, prepared: tuple[Tensor, list[Tensor]], n: int) -> tuple[Tensor, ...]:
        images, _ = prepared
        return (images.new_empty(n, *images.shape[1:]),)

    def place(self, prepared: tuple[Tensor, list[Tensor]], view: int, masks: Tensor, out: tuple[Tensor, ...]) -> None:
        images, fills = prepared
        pixels = self.grid.to_pixels(masks).unsqueeze(1)  # [m, 1, H, W]
        torch.where(pixels, fills[view], images[view], out=out[0])

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.whole(inputs[0])

    def whole(self, images: Tensor) -> Any:
        with nullcontext() if self.precision is None else self.precision():
            return self.forward(images)
