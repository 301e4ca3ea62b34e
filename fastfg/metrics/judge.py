"""Score the maps of a group of images: plan the masks, run each mask of an image once, compute the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastfg.metrics.metric import UNCHANGED, Metric, Plan, rounding_of, unchanged
from fastfg.models import Adapter
from fastfg.perturb import (
    REMOVED,
    Baseline,
    Engine,
    Fill,
    Imputed,
    PatchGrid,
    Readings,
    View,
    generator,
    make_fill,
    running_mean_fill,
    to_device,
)
from fastfg.perturb.fills import is_named
from fastfg.perturb.imputation import impute
from fastfg.targets import Target

NOT_FINITE_MAP = "the attribution is not finite"
FLAT_MAP = "the attribution is the same for every patch"
BLANK = "the image is blank: all its pixels are the same"
NOT_FINITE_OUTPUT = "the model's logits are not finite"


@dataclass
class Images:
    """The images under evaluation.

    Attributes:
        images: [B, C, H, W]. keys: one per image; random draws depend on it.
    """

    images: Tensor
    keys: Sequence[str]
    grid: PatchGrid
    seed: int
    adapter: Adapter | None

    def random(self, image: int, purpose: str) -> torch.Generator:
        return generator(self.seed, self.keys[image], purpose)

    def fill(self, image: int, baseline: Baseline) -> Fill:
        """What fills the removed patches of one image; a tensor ``baseline`` is that of this image alone."""
        if is_named(baseline, "removed"):
            return REMOVED
        if is_named(baseline, "imputed"):
            noise = self.random(image, "baseline")
            return Imputed(lambda masks: impute(self.images[image], masks, self.grid, noise))
        mean, std = (self.adapter.pixel_mean, self.adapter.pixel_std) if self.adapter is not None else (None, None)
        random = self.random(image, "baseline")
        return make_fill(baseline, self.images[image], 0, self.grid, random, mean, std)

    def fills(self, metrics: Sequence[Metric], image: int) -> list[Fill]:
        """What fills the removed patches of one image, once per baseline of ``metrics``."""
        by_baseline = {id(m.baseline) if isinstance(m.baseline, Tensor) else m.baseline: m for m in metrics}
        own = [metric.for_images(slice(image, image + 1)).baseline for metric in by_baseline.values()]
        return [self.fill(image, baseline) for baseline in own if baseline is not None]

    @cached_property
    def blank(self) -> list[bool]:
        """Whether all pixels of an image are equal, per image."""
        pixels = self.images.flatten(2)
        return (pixels == pixels[..., :1]).all(-1).all(-1).tolist()


class Unperturbed(NamedTuple):
    """What the model makes of the images as they are.

    Attributes:
        readings: [B], on the CPU. target: of the ``B`` images, see :meth:`fastfg.Target.of`.
        eps: the rounding of the output's dtype; 0 for half precision, whose rounding is no measure of an effect.
        width: how many numbers of the output the target reads per image: all logits, for a class.
    """

    readings: Readings
    target: Target
    eps: float
    width: int


@dataclass
class Outcome:
    """One metric on one image: scores [C], details [C, ...], and per map the reason for a missing score, or None."""

    scores: Tensor
    details: dict[str, Tensor]
    reasons: list[str | None]


@dataclass
class Verdict:
    """All metrics on one image. ``asked`` counts the forwards if no metric and no map shared any."""

    outcomes: dict[str, Outcome]
    asked: int


@dataclass
class _Planned:
    """One image's plans."""

    image: int
    maps: Tensor  # [U, P], the usable ones of the C maps
    reasons: list[str | None]  # [C], why a map is not usable
    metrics: list[Metric] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)


def judge(
    engine: Engine,
    metrics: Sequence[Metric],
    subjects: Images,
    seen: Unperturbed,
    maps: Tensor,  # [C, B, P]
    rows: slice,
    progress: Callable[[int, int], None] | None,
) -> Callable[[], list[Verdict]]:
    """Plan the masks of the images ``rows`` and start their forwards, without waiting for a GPU.

    Returns the function that waits for the readings and gives one verdict per image, in order.
    """
    alone = engine.paths.reads_prefix_alone
    planned = [_plan(metrics, subjects, maps[:, image], image, alone) for image in range(rows.start, rows.stop)]
    questions = _Questions(subjects)
    answers = [[questions.ask(p.image, m, plan) for m, plan in zip(p.metrics, p.plans, strict=True)] for p in planned]
    wait = questions.read(engine, seen.target, rows, progress)

    def verdicts() -> list[Verdict]:
        readings, found = wait(), []
        for p, asked in zip(planned, answers, strict=True):
            read = [readings[answer] for answer in asked]
            ignored = _is_ignored(engine, subjects, seen, p, read)
            found.append(_score(metrics, seen, p, read, ignored))
        return found

    return verdicts


def _is_ignored(
    engine: Engine, subjects: Images, seen: Unperturbed, planned: _Planned, readings: Sequence[Readings]
) -> bool:
    """Whether the model ignores an image: it gives the same under every mask, and with all patches removed.

    Asked only for metrics that do not say themselves which reading must change.
    """
    whole = seen.readings[[planned.image]]
    if all(metric.reading(read) is not None for metric, read in zip(planned.metrics, readings, strict=True)):
        return False
    if not all(_is_unchanged(read[[u]].after(whole), seen.eps) for read in readings for u in range(len(planned.maps))):
        return False
    baseline = planned.metrics[0].baseline
    assert baseline is not None  # choose_metrics
    view = View(subjects.images[planned.image], subjects.fill(planned.image, baseline))
    everything = torch.ones(1, subjects.grid.n_patches, dtype=torch.bool, device="cpu")
    if view.kind == "removed" and not engine.paths.reads_prefix_alone:
        everything[:, 0] = False  # the model needs a patch
    empty = engine.read(
        [view], torch.zeros(1, dtype=torch.long, device="cpu"), everything, seen.target[[planned.image]]
    ).cpu()
    return _is_unchanged(Readings(*(t[None] for t in (empty.logit, empty.prob, empty.max_prob))).after(whole), seen.eps)


def _is_unchanged(readings: Readings, eps: float) -> bool:
    """Whether neither the logit nor the probability [1, 1 + m] changes."""
    return all(unchanged(values, readings.logit, eps)[0] for values in (readings.logit, readings.prob))


def _plan(metrics: Sequence[Metric], subjects: Images, maps: Tensor, image: int, alone: bool) -> _Planned:
    """The masks of every metric for the usable maps among ``maps`` [C, P] of one image.

    ``alone``: whether the model has an output when all tokens of the patches have left.
    """
    blank = BLANK if subjects.blank[image] else None
    reasons = [unusable(one) or blank for one in maps]
    planned = _Planned(image, maps[[reason is None for reason in reasons]], reasons)
    if len(planned.maps):
        for metric in metrics:
            own = metric.for_images(slice(image, image + 1))
            planned.metrics.append(own)
            plan = own.plan(planned.maps.clone(), subjects.grid, subjects.random(image, metric.purpose))
            plan = _checked(metric, plan, planned.maps)
            planned.plans.append(
                plan if alone or not is_named(own.baseline, "removed") else _without_everything(metric, plan)
            )
    return planned


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


def unusable(one: Tensor) -> str | None:
    """Why a map [P] is not usable, or None."""
    if not bool(one.isfinite().all()):
        return NOT_FINITE_MAP
    return FLAT_MAP if float(one.max() - one.min()) <= float(rounding_of(one)) else None


def _checked(metric: Metric, plan: Plan, maps: Tensor) -> Plan:
    """``plan``, whose masks fit the maps [U, P]."""
    masks, (U, P) = plan.masks, maps.shape
    fits = isinstance(masks, Tensor) and masks.dtype == torch.bool and masks.ndim == 3
    if not fits or (len(masks), masks.shape[2]) != (U, P):
        got = f"{masks.dtype} {list(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"{metric.name}: expected plan.masks bool [{U}, m, {P}], got {got}")
    return plan


class _Questions:
    """Collects the masks of all metrics, and reads each distinct mask of a view once."""

    def __init__(self, subjects: Images) -> None:
        self.subjects = subjects
        self.views: list[View] = []
        self.image_of: list[int] = []  # the image of each view
        self._fills: dict[object, int] = {}  # views that metrics share, by image and baseline
        self._view: list[Tensor] = []  # the view of each requested mask
        self._masks: list[Tensor] = []
        self._asked = 0

    def ask(self, image: int, metric: Metric, plan: Plan) -> Tensor:
        """Add the masks of ``plan``. Returns their positions [U, m] among all requested masks."""
        U, m, P = plan.masks.shape
        self._view.append(torch.tensor(self._views_of(image, metric, plan), device="cpu").repeat_interleave(m))
        self._masks.append(plan.masks.reshape(U * m, P))
        places = torch.arange(self._asked, self._asked + U * m, device="cpu").reshape(U, m)
        self._asked += U * m
        return places

    def read(
        self,
        engine: Engine,
        target: Target,
        rows: slice,
        progress: Callable[[int, int], None] | None,
    ) -> Callable[[], Readings]:
        """Start the forwards. Returns the function that waits for the readings of all requested masks, on the CPU."""
        images = self.subjects.images
        total = len(images)
        if not self._view:
            if progress is not None:
                progress(rows.stop, total)
            return lambda: Readings.empty(0, torch.device("cpu"))
        view, masks = torch.cat(self._view), torch.cat(self._masks)
        chosen, row = _each_once(view, masks)
        image = torch.tensor(self.image_of, device="cpu")[view[chosen]]  # the image of each mask, ascending

        def tell(done: int) -> None:
            """Report progress: an image is done when its last mask is."""
            if progress is not None:
                progress(int(image[done]) if done < len(image) else rows.stop, total)

        of_images = target[to_device(image, images.device)]
        arrive = engine.read(self.views, view[chosen], masks[chosen], of_images, tell).on_the_way()
        return lambda: arrive()[row]

    def _views_of(self, image: int, metric: Metric, plan: Plan) -> list[int]:
        """One view per map of the plan."""
        baseline = metric.baseline
        if is_named(baseline, "running_mean") and plan.order is not None:
            subject, grid = self.subjects.images[image], self.subjects.grid
            orders = plan.order.to(subject.device)
            fills = [running_mean_fill(subject, order, plan.patches_per_step, grid) for order in orders]
            return [self._add(image, fill) for fill in fills]
        assert baseline is not None  # choose_metrics
        key = (image, tuple(baseline.flatten().tolist()) if isinstance(baseline, Tensor) else baseline)
        if key not in self._fills:
            self._fills[key] = self._add(image, self.subjects.fill(image, baseline))
        return [self._fills[key]] * len(plan.masks)

    def _add(self, image: int, fill: Fill) -> int:
        self.views.append(View(self.subjects.images[image], fill))
        self.image_of.append(image)
        return len(self.views) - 1


def _each_once(view: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct masks, ordered by view; and for each requested mask, its row among the distinct ones."""
    order = view.argsort(stable=True).numpy()
    keys = np.concatenate([view.numpy()[:, None].view(np.uint8), np.packbits(masks.numpy(), axis=1)], axis=1)[order]
    whole = np.ascontiguousarray(keys).view(np.dtype((np.void, keys.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    as_asked = first.argsort()  # unique sorts by content
    place, rows = np.empty_like(as_asked), np.empty_like(order)
    place[as_asked] = np.arange(len(as_asked))
    rows[order] = place[inverse]
    return torch.from_numpy(order[first[as_asked]]), torch.from_numpy(rows)


def _score(
    metrics: Sequence[Metric], seen: Unperturbed, planned: _Planned, readings: Sequence[Readings], ignored: bool
) -> Verdict:
    """The scores of one image from the readings [U, m] of each metric's masks."""
    whole = seen.readings[torch.full((len(planned.maps),), planned.image, device="cpu")]
    outcomes = {metric.name: no_outcome(planned.reasons) for metric in metrics}
    for metric, plan, read in zip(planned.metrics, planned.plans, readings, strict=True):
        outcomes[metric.name] = _outcome(metric, planned, plan, read.after(whole), seen.eps, ignored)
    asked = sum(len(plan.masks) * (plan.masks.shape[1] + plan.n_unperturbed) for plan in planned.plans)
    return Verdict(outcomes, max(asked, 1))  # the image as it is was read in any case


def no_outcome(reasons: list[str | None]) -> Outcome:
    """The outcome for an image that has no usable map."""
    return Outcome(torch.full((len(reasons),), torch.nan, dtype=torch.float64, device="cpu"), {}, reasons)


def _outcome(metric: Metric, planned: _Planned, plan: Plan, readings: Readings, eps: float, ignored: bool) -> Outcome:
    """Scores at the positions of their maps. A score without meaning is NaN and has a reason."""
    scores, details = _scored(metric, planned.maps, plan, readings)
    used = metric.reading(readings)
    finite = (readings.logit.isfinite() & readings.prob.isfinite() if used is None else used.isfinite()).all(1).tolist()
    nothing = metric.says_nothing(planned.maps, plan, readings, eps)
    if used is None and ignored:
        nothing = [reason or UNCHANGED for reason in nothing]
    defined = scores.isfinite().tolist()
    found = [
        NOT_FINITE_OUTPUT if not ok else reason or (None if good else f"{metric.name} is not defined here")
        for ok, reason, good in zip(finite, nothing, defined, strict=True)
    ]
    return outcome_of(scores, details, found, planned.reasons)


def outcome_of(
    scores: Tensor, details: dict[str, Tensor], found: Sequence[str | None], reasons: Sequence[str | None]
) -> Outcome:
    """The outcome [C] from the scores and details of the U usable maps.

    ``found`` says per usable map why its score is missing, and ``reasons`` per map why it is not usable.
    """
    scores = torch.where(torch.tensor([reason is None for reason in found], device="cpu"), scores, torch.nan)
    judged = torch.tensor([reason is None for reason in reasons], device="cpu")
    rest = iter(found)
    why = [next(rest) if reason is None else reason for reason in reasons]
    return Outcome(_spread(scores, judged), {name: _spread(t, judged) for name, t in details.items()}, why)


def _scored(metric: Metric, maps: Tensor, plan: Plan, readings: Readings) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``metric.score`` gives, checked: float64 scores [U], and details each [U, ...]."""
    return checked_scores(metric, len(maps), *metric.score(maps.clone(), plan, readings))


def checked_scores(
    metric: Metric, U: int, scores: Tensor, details: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Float64 scores [U] and details, each [U, ...]. Raises ValueError for other shapes."""
    if not isinstance(scores, Tensor) or list(scores.shape) != [U]:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{metric.name}: expected scores [{U}], one per map, got {got}")
    for name, values in details.items():
        if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != U:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{metric.name}: expected details[{name!r}] [{U}, ...], one per map, got {got}")
    return scores.double(), details


def _spread(values: Tensor, used: Tensor) -> Tensor:
    """``values`` [U, ...] at the positions of the ``used`` maps: [C, ...], elsewhere NaN (-1 for integers)."""
    everywhere = torch.full((len(used), *values.shape[1:]), missing_value(values), dtype=values.dtype, device="cpu")
    everywhere[used] = values
    return everywhere


def missing_value(like: Tensor) -> float:
    """The value for a missing detail: NaN, or -1 for integers."""
    return torch.nan if like.is_floating_point() else -1
