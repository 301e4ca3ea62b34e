"""Explain images again under the changes that metrics ask for, and score the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfg.metrics.choose import METRICS
from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject
from fastfg.metrics.metric import Metric
from fastfg.metrics.other_model import OtherModel
from fastfg.metrics.outcomes import Outcome, Verdict, checked_scores, no_outcome, outcome_of
from fastfg.metrics.planning import unusable
from fastfg.metrics.subjects import Images, Unperturbed
from fastfg.models.redraw import copy_model, find_parts, read_model, redraw
from fastfg.perturb import Batches, generator
from fastfg.targets import Target, TargetLike, as_given

# model, images, target -> maps; or a list of C maps [B, gh, gw], with None for those that can't be made again
Explain = Callable[[Any, Tensor, Any], "Tensor | Sequence[Tensor | None]"]
NOT_AGAIN = "the map can't be made again for another image, target or model"
ON_CPU, ON_GPU = 8, 64  # images per attribution
AT_ONCE = 32  # images whose maps are kept until they are scored
SAME = 0.01  # a map that differs by more than this share of its largest value is another map
SAME_IN_EPS = 32  # the same for a model in half precision, in units of its rounding
NONE: frozenset[int] = frozenset()


def explaining(metrics: Iterable[Metric], explain: Explain | None, target: Target) -> list[ExplanationMetric]:
    """The metrics that explain again. Raises ValueError where they, ``explain`` and ``target`` do not fit together."""
    found = [metric for metric in metrics if isinstance(metric, ExplanationMetric)]
    if explain is not None and not callable(explain):
        raise TypeError(f"explain: expected a function (model, images, target) -> maps, got {type(explain).__name__}")
    if found and explain is None:
        raise ValueError(
            f"explain: expected the function (model, images, target) -> maps that made the maps, as {found[0].name} "
            "explains images again, got None"
        )
    if explain is not None and not found:
        raise ValueError("explain: expected None, as no metric explains images again, got a function")
    for metric in found:
        if metric.needs_classes and (not target.needs_logits or target.minus is not None):
            raise ValueError(f"target: expected classes, as {metric.name} explains another class, got {target!r}")
    return found


def explains_again(metrics: Iterable[str | Metric]) -> bool:
    """Whether one of ``metrics``, by name or as an instance, needs ``evaluate(..., explain=)``."""
    return any(
        issubclass(METRICS.get(metric, Metric) if isinstance(metric, str) else type(metric), ExplanationMetric)
        for metric in metrics
    )


@dataclass(frozen=True)
class ByPlace:
    """A function that explains, and is also told which of the evaluated images each one comes from.

    Two images may have the same pixels and different keys, so the pixels alone do not say it.
    """

    function: Callable[[Any, Tensor, Any, list[int]], Tensor | Sequence[Tensor | None]]

    def __call__(self, model: Any, images: Tensor, target: Any, places: list[int]) -> Tensor | Sequence[Tensor | None]:
        return self.function(model, images, target, places)


class _Map(NamedTuple):
    """One map to make. Metrics that need the same one share it; those of one ``redrawn`` are made together."""

    redrawn: frozenset[int]
    image: int
    noise: tuple[str, int] | None  # the metric that draws it, and its number
    target: int | None


@dataclass
class _Asked:
    """One metric on one image: its changes, and the maps under them [C, m, P], summed up as they are made."""

    metric: ExplanationMetric
    subject: Subject
    changes: list[Change]
    again: Tensor
    missing: set[int]  # those of the C maps that can't be made again


@dataclass
class Explanations:
    """The function that explains, and what it explains.

    Args:
        seen: what the model makes of the images; its target is of these images. given: the target as it was given.
        maps: [C, B, P], the given maps, float64 on the CPU; they came as [B, gh, gw] if ``single``.
        batch_size: the most images per call of ``explain``; None: 8 on the CPU and 64 on a GPU, at most.
    """

    explain: Explain | ByPlace
    model: Any
    subjects: Images
    seen: Unperturbed
    given: TargetLike
    maps: Tensor
    single: bool
    batch_size: int | None
    explained: int = 0  # images so far
    states: States | None = None
    other: OtherModel | None = None  # beside ``states``

    def __post_init__(self) -> None:
        most = ON_GPU if self.subjects.images.is_cuda else ON_CPU
        self.batches = Batches(min(self.batch_size or most, most))

    def add_outcomes(
        self,
        metrics: Sequence[ExplanationMetric],
        verdicts: Sequence[Verdict],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Add the outcomes of ``metrics`` to the verdict of each image."""
        for start in range(0, len(verdicts), AT_ONCE):
            rows = slice(start, min(start + AT_ONCE, len(verdicts)))
            for verdict, outcomes in zip(verdicts[rows], self.judge(metrics, rows), strict=True):
                verdict.outcomes.update(outcomes)
            if progress is not None:
                progress(rows.stop, len(verdicts))
        if self.other is not None:
            self.other.check(self.single)

    def judge(self, metrics: Sequence[ExplanationMetric], rows: slice) -> list[dict[str, Outcome]]:
        """{metric: outcome} per image of ``rows``, in order."""
        if self.states is None and any(metric.redraws for metric in metrics):
            self.states = States(self.model, self.subjects.images[:1], self._read_first, self.subjects.seed)
            self.other = OtherModel(self.model, len(self.maps))
        outcomes, asked = [], []
        for image in range(rows.start, rows.stop):
            reasons = unusable(self.maps[:, image])
            mine = [self._ask(metric, image) for metric in metrics] if None in reasons else []
            outcomes.append((image, reasons, mine))
            asked += [(image, one) for one in mine]
        self._make(asked)
        return [
            {one.metric.name: _outcome(one, self.maps[:, image], reasons) for one in mine}
            or {metric.name: no_outcome(reasons) for metric in metrics}
            for image, reasons, mine in outcomes
        ]

    def _ask(self, metric: ExplanationMetric, image: int) -> _Asked:
        parts = tuple(part.name for part in self.states.parts) if self.states is not None else ()
        target, n_classes = None, None
        if metric.needs_classes:
            chosen = self.seen.target[[image]].classes
            assert chosen is not None  # explaining
            target, n_classes = int(chosen), max(self.seen.width, 2)  # one logit has two classes
        subject = Subject(target, n_classes, parts)
        changes = metric.changes(subject, self.subjects.random(image, metric.name))
        C, _, P = self.maps.shape
        return _Asked(
            metric, subject, changes, torch.zeros(C, len(changes), P, dtype=torch.float64, device="cpu"), set()
        )

    def _make(self, asked: Sequence[tuple[int, _Asked]]) -> None:
        """Fill in the maps of ``asked``, and check that the images as they are give the given maps."""
        metrics = {one.metric.name: one.metric for _, one in asked}
        same = {image: torch.zeros_like(self.maps[:, image]) for image, _ in asked}
        missing: dict[int, set[int]] = {image: set() for image in same}
        wanted = {_Map(NONE, image, None, None): [(same[image], 1, missing[image])] for image in same}
        for image, one in asked:
            for j, change in enumerate(one.changes):
                for number in change.noises:
                    noise = None if number is None else (one.metric.name, number)
                    key = _Map(change.redrawn, image, noise, change.target)
                    wanted.setdefault(key, []).append((one.again[:, j], len(change.noises), one.missing))
        anew: dict[int, Tensor] = {}  # the maps with all parameters re-drawn
        everything = NONE if self.states is None else self.states.all_parts
        for image in same if everything else ():
            key = _Map(everything, image, None, None)
            if key in wanted:
                anew[image] = torch.zeros_like(same[image])
                wanted[key].append((anew[image], 1, set()))
        by_state: dict[frozenset[int], list[_Map]] = {}
        for key in wanted:
            by_state.setdefault(key.redrawn, []).append(key)
        for redrawn, keys in by_state.items():
            self._make_with(self._model(redrawn), keys, wanted, metrics)
            if redrawn == NONE:  # comes first
                for image, found in same.items():
                    self._check_same(image, found, missing[image])
        for image, found in anew.items():
            assert self.other is not None  # beside states
            why = unusable(self.maps[:, image])
            judged = [reason is None and c not in missing[image] for c, reason in enumerate(why)]
            self.other.add(found, same[image], self.maps[:, image], torch.tensor(judged, device="cpu"))

    def _model(self, redrawn: frozenset[int]) -> Any:
        if not redrawn:
            return self.model
        assert self.states is not None  # metric.redraws
        return self.states.at(redrawn)

    def _make_with(
        self,
        model: Any,
        keys: Sequence[_Map],
        wanted: dict[_Map, list[tuple[Tensor, int, set[int]]]],
        metrics: dict[str, ExplanationMetric],
    ) -> None:
        """Make the maps ``keys`` with one model, and add each to the sums that want it."""

        def work(rows: slice) -> None:
            batch = keys[rows]
            images = torch.stack([self._image(key, metrics) for key in batch])
            made, missing = self._explain(model, images, self._targets(batch), [key.image for key in batch])
            self.explained += len(batch)
            for k, key in enumerate(batch):
                for total, of, of_these in wanted[key]:
                    total += made[:, k] / of
                    of_these |= missing

        self.batches.run(len(keys), work)

    def _image(self, key: _Map, metrics: dict[str, ExplanationMetric]) -> Tensor:
        image = self.subjects.images[key.image]
        if key.noise is None:
            return image
        name, number = key.noise
        return metrics[name].noisy(image, self.subjects.random(key.image, f"{name} noise {number}"))

    def _targets(self, keys: Sequence[_Map]) -> Any:
        """The target of each map, in the form in which it was given."""
        target = self.seen.target[[key.image for key in keys]]
        if any(key.target is not None for key in keys):
            assert target.classes is not None  # metric.needs_classes
            pairs = zip(keys, target.classes.tolist(), strict=True)
            chosen = [own if key.target is None else key.target for key, own in pairs]
            classes = torch.tensor(chosen, device=target.classes.device)
            target = Target(classes, link=target.link, output=target.output)
        return as_given(self.given, target)

    def _explain(self, model: Any, images: Tensor, target: Any, places: list[int]) -> tuple[Tensor, set[int]]:
        """The maps [C, b, P] that ``explain`` makes, float64 on the CPU, and those of the C that it can't make."""
        gh, gw = self.subjects.grid.gh, self.subjects.grid.gw
        C, b = len(self.maps), len(images)
        shape = [b, gh, gw] if self.single else [C, b, gh, gw]
        watched = nullcontext() if self.other is None or model is self.model else self.other
        with torch.inference_mode(False), torch.enable_grad(), watched:
            if isinstance(self.explain, ByPlace):
                maps = self.explain(model, images, target, places)
            else:
                maps = self.explain(model, images, target)
        missing: set[int] = set()
        if isinstance(maps, (list, tuple)):
            missing = {c for c, one in enumerate(maps) if one is None}
            none = images.new_full((b, gh, gw), torch.nan)
            maps = torch.stack([none if one is None else one for one in maps])
        if not isinstance(maps, Tensor) or list(maps.shape) != shape or not maps.is_floating_point():
            got = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"explain: expected maps {shape} for {b} images, floating as maps, got {got}")
        return maps.detach().double().cpu().reshape(C, b, gh * gw), missing

    def _check_same(self, image: int, found: Tensor, missing: set[int]) -> None:
        """Raise ValueError unless ``explain`` made the given maps."""
        why = unusable(self.maps[:, image])
        for c, (given, made) in enumerate(zip(self.maps[:, image], found, strict=True)):
            if why[c] is not None or c in missing:
                continue
            error = float((made - given).abs().max() / given.abs().max())
            if not error <= max(SAME, SAME_IN_EPS * torch.finfo(self.subjects.images.dtype).eps):
                which = "" if self.single else f"{c} "
                raise ValueError(
                    f"explain: expected the given maps for the images as they are, got a difference of {error:.0%} of "
                    f"the largest value in map {which}of image {image} (another target, gate or scale?)"
                )

    def _read_first(self, output: Any) -> Tensor:
        """The target's value [1] for the first image."""
        return self.seen.target[[0]].value(output, 1)


class States:
    """A model with some of its parts re-drawn. There is one copy of the model at a time.

    Args:
        images: [1, C, H, W], an image that tells whether the copy is one. read: the model's output -> [1].
    """

    def __init__(self, model: Any, images: Tensor, read: Callable[[Any], Tensor], seed: int) -> None:
        self.model, self.images, self.read, self.seed = model, images, read, seed
        self.copy, self.redrawn = copy_model(model), NONE
        self.value = read_model(model, images, read)
        other = read_model(self.copy, images, read)
        if not torch.allclose(other, self.value, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"model: expected a copy of it to give the same output, got {float(other):.6g} in place of "
                f"{float(self.value):.6g} (an adapter whose forward does more than its model?)"
            )
        self.parts = find_parts(self.copy, images, read)
        if not self.parts:
            raise ValueError(f"model: expected parameters that can be re-drawn in {type(model).__name__}, got none")

    @property
    def all_parts(self) -> frozenset[int]:
        return frozenset(range(len(self.parts)))

    def at(self, redrawn: frozenset[int]) -> Any:
        """The copy with exactly the parts ``redrawn`` re-drawn."""
        if not self.redrawn <= redrawn:
            self.copy = None  # it goes before the next one is made
            self.copy, self.redrawn = copy_model(self.model), NONE
        for number in sorted(redrawn - self.redrawn):
            part = self.parts[number]
            redraw(self.copy, part, generator(self.seed, part.name, "re-drawn").initial_seed())
        self.redrawn = redrawn
        if len(redrawn) == len(self.parts) and torch.equal(read_model(self.copy, self.images, self.read), self.value):
            raise ValueError(
                "model: expected another output when all parameters are re-drawn, got the same (a forward that runs "
                "another module than the model's copy?)"
            )
        return self.copy


def _outcome(asked: _Asked, maps: Tensor, reasons: list[str | None]) -> Outcome:
    """Scores of one metric on one image, for the usable ones of its maps [C, P]."""
    usable = torch.tensor([reason is None for reason in reasons], device="cpu")
    again, metric = asked.again[usable], asked.metric
    scores, details = metric.compare(maps[usable], again, asked.changes)
    scores, details = checked_scores(metric, len(again), scores, details)
    nothing = metric.undefined(again, asked.changes, asked.subject)
    places = usable.nonzero().flatten().tolist()
    nothing = [NOT_AGAIN if c in asked.missing else why for c, why in zip(places, nothing, strict=True)]
    defined = scores.isfinite().tolist()
    found = [
        why or (None if good else f"{metric.name} is not defined here")
        for why, good in zip(nothing, defined, strict=True)
    ]
    return outcome_of(scores, details, found, reasons)
