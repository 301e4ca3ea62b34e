"""Views: an image, and what takes the place of its removed patches. The engine runs each kind by its own path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Tensor


class Removed(Enum):
    """No fill: the tokens of removed patches leave the sequence."""

    REMOVED = "removed"


REMOVED = Removed.REMOVED


@dataclass(frozen=True, eq=False)
class Imputed:
    """A fill that depends on the mask: the perturbed images are made per mask, and run from the pixels.

    Args:
        images: masks [m, P] bool, True: removed -> perturbed images [m, C, H, W]. The masks are on the image's device,
            the images have its device and dtype. Called with any number of masks of this view, several times; the
            same mask must give the same image each time.
    """

    images: Callable[[Tensor], Tensor]


Fill = Tensor | Removed | Imputed
KINDS = ("filled", "imputed", "removed")  # in the order in which the engine runs them


class View(NamedTuple):
    """An image [C, H, W], and the fill of its removed patches.

    A tensor that broadcasts against the image, an :class:`Imputed`, or :data:`REMOVED`.
    """

    image: Tensor
    fill: Fill

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        if isinstance(self.fill, Tensor):
            return "filled"
        return "imputed" if isinstance(self.fill, Imputed) else "removed"
