"""Which maps of a group of images can be judged, and the masks that each metric asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan, rounding_of
from fastfg.metrics.subjects import Images
from fastfg.perturb.fills import is_named

NOT_FINITE_MAP = "the attribution is not finite"
FLAT_MAP = "the attribution is the same for every patch"
BLANK = "the image is blank: all its pixels are the same"
AT_ONCE = 2**22  # maps are scored together up to this number of pairs of patches


class Usable(NamedTuple):
    """The usable maps of a group of images, one after the other.

    Attributes:
        maps: [n, P]. spans: {image: its rows of ``maps``}, for images that have any, in order.
        reasons: {image: [C]}, why a map is not usable, or None.
    """

    maps: Tensor
    spans: dict[int, slice]
    reasons: dict[int, list[str | None]]


@dataclass
class Planned:
    """One metric's plan for the usable maps of one image, or of several if it plans or scores them together.

    Attributes:
        metric: its arguments that have an entry per image are those of the image.
        maps: [n, P]. plan: with as many rows. spans: {image: its rows}, in order.
    """

    metric: Metric
    maps: Tensor
    plan: Plan
    spans: dict[int, slice]

    def pieces(self) -> Iterator[tuple[slice, dict[int, slice]]]:
        """Rows that are scored together, and where in them the rows of each image are. Bounds the memory."""
        most = max(1, AT_ONCE // self.maps.shape[1] ** 2)
        start, own = 0, dict[int, slice]()
        for image, span in self.spans.items():
            if own and span.stop - start > most:
                yield slice(start, span.start), own
                start, own = span.start, {}
            own[image] = slice(span.start - start, span.stop - start)
        if own:
            yield slice(start, len(self.maps)), own


def unusable(maps: Tensor) -> list[str | None]:
    """Why a map is not usable, or None, for each of ``maps`` [n, P]."""
    finite = maps.isfinite().all(1).tolist()
    flat = (maps.amax(1) - maps.amin(1) <= rounding_of(maps)[:, 0]).tolist()
    return [NOT_FINITE_MAP if not ok else FLAT_MAP if same else None for ok, same in zip(finite, flat, strict=True)]


def usable(maps: Tensor, subjects: Images, rows: slice) -> Usable:
    """The usable ones among ``maps`` [C, B, P], for the images ``rows``."""
    C, P = maps.shape[0], maps.shape[2]
    group = maps[:, rows].transpose(0, 1).reshape(-1, P)
    why = unusable(group)
    spans, reasons, kept = dict[int, slice](), dict[int, list[str | None]](), list[int]()
    for at, image in enumerate(range(rows.start, rows.stop)):
        blank = BLANK if subjects.blank[image] else None
        reasons[image] = [reason or blank for reason in why[at * C : (at + 1) * C]]
        own = [at * C + c for c, reason in enumerate(reasons[image]) if reason is None]
        if own:
            spans[image] = slice(len(kept), len(kept) + len(own))
            kept += own
    return Usable(group[kept], spans, reasons)


def plan_all(metrics: Sequence[Metric], subjects: Images, group: Usable, alone: bool) -> list[Planned]:
    """The masks of every metric for the maps of ``group``.

    ``alone``: whether the model has an output when all tokens of the patches have left.
    """
    return [planned for metric in metrics for planned in _plans(metric, subjects, group, alone)] if group.spans else []


def _plans(metric: Metric, subjects: Images, group: Usable, alone: bool) -> list[Planned]:
    """The plans of one metric: one for all images if the metric can, else one per image."""

    def plan(span: slice, image: int) -> Planned:
        own, maps = metric.for_images(slice(image, image + 1)), group.maps[span]
        found = _checked(own, own.plan(maps.clone(), subjects.grid, subjects.random(image, metric.purpose)), maps)
        if not alone and is_named(own.baseline, "removed"):
            found = _without_everything(own, found)
        return Planned(own, maps, found, {image: slice(0, len(maps))})

    together = _together(metric)
    if "plan" in together:
        planned = plan(slice(0, len(group.maps)), next(iter(group.spans)))  # the random draws are not used
        return [dataclasses.replace(planned, spans=group.spans)]
    each = [plan(span, image) for image, span in group.spans.items()]
    return (
        [Planned(metric, group.maps, _joined([one.plan for one in each]), group.spans)] if "score" in together else each
    )


def _together(metric: Metric) -> tuple[str, ...]:
    """What ``metric`` does for the maps of many images in one call, see :attr:`Metric.together`."""
    stated: tuple[str, ...] = vars(type(metric)).get("together", ())
    own = metric.per_image() or not {"plan", "score"}.isdisjoint(vars(metric))  # someone has replaced one of them
    return () if own else stated


def _joined(plans: Sequence[Plan]) -> Plan:
    """The plans of several images as one."""
    first = plans[0]
    assert first.order is None, "a metric that plans an order must plan all images together"
    details = {name: torch.cat([plan.details[name] for plan in plans]) for name in first.details}
    return dataclasses.replace(first, masks=torch.cat([plan.masks for plan in plans]), details=details)


def rows_of(plan: Plan, rows: slice) -> Plan:
    """The plan for some of its maps."""
    order = None if plan.order is None else plan.order[rows]
    details = {name: values[rows] for name, values in plan.details.items()}
    return dataclasses.replace(plan, masks=plan.masks[rows], order=order, details=details)


def _without_everything(metric: Metric, plan: Plan) -> Plan:
    """``plan`` without the masks at its end that remove every patch: the model has no output for them."""
    everything = plan.masks.all(-1)  # [U, m]
    m = plan.masks.shape[1]
    while plan.order is not None and m and bool(everything[:, m - 1].all()):
        m -= 1
    if bool(everything[:, :m].any()):
        raise ValueError(
            f"{metric.name}: expected masks that leave a patch, as the model has no output without patches under "
            "baseline='removed', got one that removes all"
        )
    return plan if m == plan.masks.shape[1] else dataclasses.replace(plan, masks=plan.masks[:, :m])


def _checked(metric: Metric, plan: Plan, maps: Tensor) -> Plan:
    """``plan``, whose masks fit the maps [U, P]."""
    masks, (U, P) = plan.masks, maps.shape
    fits = isinstance(masks, Tensor) and masks.dtype == torch.bool and masks.ndim == 3
    if not fits or (len(masks), masks.shape[2]) != (U, P):
        got = f"{masks.dtype} {list(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"{metric.name}: expected plan.masks bool [{U}, m, {P}], got {got}")
    return plan
