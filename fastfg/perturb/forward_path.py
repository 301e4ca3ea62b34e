"""The interface of the two ways to run a model on perturbed images, :class:`Pixels` and :class:`Tokens`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class ForwardPath(Protocol):
    """A way to run a model on perturbed images. A view is an image and the fill of its removed patches."""

    def prepare(self, images: Tensor, fills: list[Tensor]) -> Any:
        """The work that is done once per view, for ``V`` views: ``images`` [V, C, H, W] with their ``fills``."""

    def buffers(self, prepared: Any, n: int) -> tuple[Tensor, ...]:
        """Empty buffers for ``n`` perturbed inputs, each tensor [n, ...]."""

    def place(self, prepared: Any, view: int, masks: Tensor, out: tuple[Tensor, ...]) -> None:
        """Write the view under ``masks`` [m, P] into ``out`` [m, ...]."""

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The model's output for ``n`` perturbed inputs."""

    def whole(self, images: Tensor) -> Any:
        """The model's output for unperturbed images."""
