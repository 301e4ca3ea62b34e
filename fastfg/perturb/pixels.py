"""Perturb pixels: the model runs on the perturbed images themselves. This works for any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.precision import Precision
from fastfg.perturb.views import Imputed

Forward = Callable[[Tensor], Any]


class Pixels:
    """The reference path, and the only one for models of no known family.

    Args:
        forward: images [n, C, H, W] -> the model's output. grid: where the patches lie.
        precision: a context for the forward passes (see ``Precision``); None: the model's own.
    """

    def __init__(self, forward: Forward, grid: PatchGrid, precision: Precision | None = None) -> None:
        self.forward, self.grid, self.precision = forward, grid, precision

    def prepare(self, images: Tensor, fills: Sequence[Tensor]) -> list[Tensor]:
        return [images, torch.stack([fill.expand(images.shape[1:]) for fill in fills])]

    def inputs(
        self, prepared: list[Tensor], view: Tensor, masks: Tensor, left: int | None = None
    ) -> tuple[Tensor, ...]:
        images, filled = prepared
        pixels = self.grid.to_pixels(masks).unsqueeze(1)  # [n, 1, H, W]
        return (torch.where(pixels, filled[view], images[view]),)

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.whole(inputs[0])

    def whole(self, images: Tensor) -> Any:
        with nullcontext() if self.precision is None else self.precision():
            return self.forward(images)


class ImputedPixels(Pixels):
    """The path of fills that depend on the mask: each view makes its own perturbed images."""

    def prepare(self, images: Tensor, fills: Sequence[Imputed]) -> list[Any]:  # type: ignore[override]
        return [images, list(fills)]

    def inputs(self, prepared: list[Any], view: Tensor, masks: Tensor, left: int | None = None) -> tuple[Tensor, ...]:
        images, fills = prepared
        perturbed = images.new_empty(len(masks), *images.shape[1:])
        views, counts = view.unique_consecutive(return_counts=True)
        for v, rows in zip(views.tolist(), torch.arange(len(view), device="cpu").split(counts.tolist()), strict=True):
            made = fills[v].images(masks[rows])
            if made.shape != perturbed[rows].shape:
                raise ValueError(
                    f"images: expected {list(perturbed[rows].shape)} from the fill, got {list(made.shape)}"
                )
            perturbed[rows] = made
        return (perturbed,)
