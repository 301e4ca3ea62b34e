"""The base class of metrics: ``plan`` chooses which patches to remove, ``score`` turns the readings into scores."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fastfg.perturb import Baseline, PatchGrid, Readings
from fastfg.perturb.fills import is_per_image

Self = TypeVar("Self", bound="Metric")
UNCHANGED = "removing patches does not change the reading"
ROUNDING_64 = 2.0**-40  # of a map in float64, relative to its largest value
TIED = 0.1  # a score that counts ties as agreement may rest on this share of them where half precision makes some
ROUNDING = 4  # a logit that changes by fewer units of rounding than this counts as unchanged


@dataclass(frozen=True)
class Plan:
    """The masks of one metric for the ``C`` maps of one image.

    Attributes:
        masks: [C, m, P] bool, True where a patch is removed.
        order: [C, P] patches in the order of their removal, ``patches_per_step`` at a time. Only
            ``baseline="running_mean"`` needs it: its fill drifts along this order. None: the masks have no order.
        details: {name: tensor [C, ...]}, anything that ``score`` needs besides the readings.
        n_unperturbed: how often the metric on its own would read the unperturbed image; fastfg reads it once.
    """

    masks: Tensor
    order: Tensor | None = None
    patches_per_step: int = 1
    details: dict[str, Tensor] = field(default_factory=dict)
    n_unperturbed: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """Base class of the metrics. A subclass sets the four class variables and defines two pure functions.

    Args:
        baseline: what fills removed patches; None: the ``baseline`` of the evaluation.
    """

    name: ClassVar[str]  # the key in Scores
    title: ClassVar[str]  # for tables
    short: ClassVar[str]  # for figures
    higher_is_better: ClassVar[bool]
    value_range: ClassVar[str] = ""  # for the table of metrics in the docs, as are the next three
    cost: ClassVar[str] = ""  # forwards per map, beside those that other metrics share
    source: ClassVar[str] = ""
    failings: ClassVar[str] = ""  # what is known to mislead
    depends_on_scale: ClassVar[bool] = False  # True: a map in other units has another score
    # "plan" and "score", if one call may get the maps of many images: it treats each map by itself (and ``plan`` draws
    # nothing). It counts only for the class that states it: a subclass may define another ``plan`` or ``score``.
    together: ClassVar[tuple[str, ...]] = ()
    perturbs: ClassVar[bool] = True  # False: no plan has masks, and the model is not run on perturbed images

    baseline: Baseline | None = None

    def plan(self, maps: Tensor, grid: PatchGrid, random: torch.Generator) -> Plan:
        """The masks for ``maps`` [C, P], float64 and finite, all of one image.

        ``random`` is a CPU generator that depends only on the seed, the image's key and :attr:`purpose`.
        """
        raise NotImplementedError

    def score(self, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [C] and details {name: [C, ...]}.

        ``readings`` are [C, 1 + m]: first the unperturbed image, then the image under each mask.
        """
        raise NotImplementedError

    def reading(self, readings: Readings) -> Tensor | None:
        """The reading [C, 1 + m] whose changes make the score; one that no mask changes makes the score an error.

        None: a map under which nothing changes can be a good one, as where the best patches alone are kept. The score
        is an error only if the model ignores the image: nothing changes under any map or metric, nor with all patches
        removed.
        """
        return None

    @property
    def purpose(self) -> str:
        """What the metric's random draws are for. Metrics with the same purpose get the same generator."""
        return self.name

    def says_nothing(self, maps: Tensor, plan: Plan, readings: Readings, eps: float) -> list[str | None]:
        """Per map, why its score has no meaning, or None.

        ``eps`` is the rounding of the model's output; 0 if the output is in half precision (see :func:`tied_in_half`).
        """
        used = self.reading(readings)
        return [None] * len(maps) if used is None else unchanged(used, readings.logit, eps)

    def per_image(self) -> dict[str, int]:
        """{argument: dimension} for the arguments that hold one entry per image along that dimension."""
        return {"baseline": 0} if is_per_image(self.baseline) else {}

    def check_images(self, n_images: int) -> None:
        """Raise ValueError if a per-image argument does not have ``n_images`` entries."""
        for name, dim in self.per_image().items():
            shape = list(getattr(self, name).shape)
            if shape[dim] != n_images:
                raise ValueError(f"{self.name}: expected {name} for {n_images} images in dimension {dim}, got {shape}")

    def for_images(self: Self, rows: slice) -> Self:
        """This metric for ``rows`` of the images: per-image arguments are cut to these rows."""
        cut = {}
        for name, dim in self.per_image().items():
            values = getattr(self, name)
            if values.shape[dim] < rows.stop:
                raise ValueError(
                    f"{self.name}: expected {name} for {rows.stop} images or more in dimension {dim}, got "
                    f"{list(values.shape)}"
                )
            cut[name] = values.narrow(dim, rows.start, rows.stop - rows.start)
        return self.changed(**cut)

    def changed(self: Self, **arguments: Any) -> Self:
        """This metric with other arguments."""
        if not arguments:
            return self
        other = copy.copy(self)
        for name, value in arguments.items():
            object.__setattr__(other, name, value)
        return other


def unchanged(values: Tensor, logit: Tensor, eps: float) -> list[str | None]:
    """Per row of ``values`` [C, 1 + m] and its logits, a reason if no mask changes it beyond rounding, else None.

    A probability has the rounding of its logit, relative to the probability itself. ``eps`` 0: only no change at all.
    """
    change, logit_change = ((t - t[:, :1]).abs().amax(1) for t in (values, logit))
    largest, rounding = logit.abs().amax(1), ROUNDING * eps
    still = (logit_change <= rounding * largest) & (change <= rounding * largest.clamp(min=1) * values.abs().amax(1))
    return [UNCHANGED if flat else None for flat in ((change == 0) | still).tolist()]


def tied_in_half(tied: Tensor, of: str, eps: float) -> list[str | None]:
    """Per row, a reason if more than a tenth of the score rests on ties, and the output is in half precision.

    A score that counts ties as agreement flatters any map there: half precision makes small effects equal.

    Args:
        tied: [C], the share of ties. of: what they are a share of. eps: as for :meth:`Metric.says_nothing`.
    """
    if eps:
        return [None] * len(tied)
    return [
        f"{share:.0%} of {of}, as the model's output is in half precision, and would count as agreement (run the "
        "model in float32, or a float32 model with precision='bfloat16', which keeps the head in float32)"
        if share > TIED
        else None
        for share in tied.tolist()
    ]


def check_integer(metric: str, name: str, value: Any, low: int) -> None:
    """Raise ValueError where ``value`` is not an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{metric}: expected {name} >= {low}, an integer, got {value!r}")


def check_positive(metric: str, name: str, value: Any) -> None:
    """Raise ValueError where ``value`` is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{metric}: expected {name} > 0, a finite number, got {value!r}")


def rounding_of(maps: Tensor) -> Tensor:
    """By how much values of ``maps`` [..., P], float64, may differ by rounding alone: [..., 1].

    Most maps are made in float32, as their values show. Those of mean pooling and of float64 models are not.
    """
    single = (maps == maps.float().double()).all(-1, keepdim=True)
    eps = torch.where(single, ROUNDING * torch.finfo(torch.float32).eps, ROUNDING_64)
    return eps * maps.abs().amax(-1, keepdim=True)


def descending(maps: Tensor) -> Tensor:
    """Patches by attribution, largest first, ties by patch index: [..., P] -> [..., P] indices."""
    return maps.sort(dim=-1, descending=True, stable=True).indices


def as_float64(values: Any) -> Tensor:
    """Arrays or tensors, of any dtype, as float64."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    return tensor.to(torch.float64)
