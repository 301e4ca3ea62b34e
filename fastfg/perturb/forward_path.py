"""How perturbed images reach the model: what :class:`Pixels` and :class:`Tokens` have in common."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class ForwardPath(Protocol):
    """How perturbed images reach the model. A view is an image and the fill of its removed patches."""

    def prepare(self, images: Tensor, fills: list[Tensor]) -> Any:
        """What is done once for each of the views ``images`` [V, C, H, W] with ``fills``."""

    def buffers(self, prepared: Any, n: int) -> tuple[Tensor, ...]:
        """Room for ``n`` perturbed inputs, each tensor [n, ...]."""

    def place(self, prepared: Any, view: int, masks: Tensor, out: tuple[Tensor, ...]) -> None:
        """Write the view under ``masks`` [m, P] into ``out`` [m, ...]."""

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits [n, classes] of perturbed inputs."""

    def whole(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images as they are."""
