"""The interface of the ways to run a model on perturbed images (:class:`Pixels`, :class:`Tokens` and others)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class ForwardPath(Protocol):
    """A way to run a model on perturbed images. A view is an image and the fill of its removed patches."""

    def prepare(self, images: Tensor, fills: Sequence[Any]) -> list[Any]:
        """The work that is done once per view, for ``V`` views: ``images`` [V, C, H, W] with their ``fills``.

        Returns tensors [V, ...] or lists of V items. The engine joins those of several calls.
        """

    def inputs(self, prepared: list[Any], view: Tensor, masks: Tensor, left: int | None = None) -> tuple[Tensor, ...]:
        """The perturbed inputs of ``masks`` [n, P] bool. ``view`` [n] are their places among the prepared views.

        ``left`` is the number of patches left under each mask, where tokens leave the sequence; else None.
        """

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The model's output for ``n`` perturbed inputs."""

    def whole(self, images: Tensor) -> Any:
        """The model's output for unperturbed images."""


class Paths(NamedTuple):
    """The path of each kind of view (``fastfg.perturb.View.kind``). None: the evaluation has no such views.

    ``reads_prefix_alone``: whether the model has an output when all patches are removed (it does when they are filled).
    ``eps``: the relative rounding of the forwards.
    """

    filled: ForwardPath
    imputed: ForwardPath | None = None
    removed: ForwardPath | None = None
    reads_prefix_alone: bool = True
    eps: float = 0.0
