"""Score the maps of a group of images: plan the masks, run each mask of an image once, compute the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastfg.metrics.metric import UNCHANGED, Metric, unchanged
from fastfg.metrics.outcomes import Outcome, Verdict, checked_scores, no_outcome, outcome_of
from fastfg.metrics.planning import Planned, Usable, plan_all, rows_of, usable
from fastfg.metrics.questions import Questions
from fastfg.metrics.subjects import Images, Unperturbed
from fastfg.perturb import Engine, Readings, View

NOT_FINITE_OUTPUT = "the model's logits are not finite"


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
    group = usable(maps, subjects, rows)
    planned = plan_all(metrics, subjects, group, engine.paths.reads_prefix_alone)
    questions = Questions(subjects)
    answers = questions.ask(planned, rows)
    wait = questions.read(engine, seen.target, rows, progress)

    def verdicts() -> list[Verdict]:
        readings = wait()
        read = [readings[of].after(seen.readings[_images(p)]) for p, of in zip(planned, answers, strict=True)]
        ignored = _ignored(engine, subjects, seen, planned, read)
        return _verdicts(metrics, group, planned, read, seen.eps, ignored)

    return verdicts


def _images(planned: Planned) -> Tensor:
    """The image of each of the maps: [n]."""
    counts = torch.tensor([span.stop - span.start for span in planned.spans.values()], device="cpu")
    return torch.tensor(list(planned.spans), device="cpu").repeat_interleave(counts)


def _ignored(
    engine: Engine, subjects: Images, seen: Unperturbed, planned: Sequence[Planned], readings: Sequence[Readings]
) -> set[int]:
    """The images that the model ignores: it gives the same under every mask, and with all patches removed.

    Asked only for metrics that do not say themselves which reading must change.
    """
    found: dict[int, bool] = {}
    unsaid: set[int] = set()
    for p, read in zip(planned, readings, strict=True):
        if p.metric.reading(read) is None:
            unsaid.update(p.spans)
    for p, read in zip(planned, readings, strict=True):
        if not unsaid.isdisjoint(p.spans):
            still = _unchanged(read, seen.eps)
            for image, span in p.spans.items():
                found[image] = found.get(image, True) and all(still[span])
    return {image for image in sorted(unsaid) if found[image] and _ignores(engine, subjects, seen, planned, image)}


def _ignores(engine: Engine, subjects: Images, seen: Unperturbed, planned: Sequence[Planned], image: int) -> bool:
    """Whether the model gives the same for an image with all patches removed."""
    baseline = next(p.metric.baseline for p in planned if image in p.spans)
    assert baseline is not None  # choose_metrics
    view = View(subjects.images[image], subjects.fill(image, baseline))
    everything = torch.ones(1, subjects.grid.n_patches, dtype=torch.bool, device="cpu")
    if view.kind == "removed" and not engine.paths.reads_prefix_alone:
        everything[:, 0] = False  # the model needs a patch
    first = torch.zeros(1, dtype=torch.long, device="cpu")
    empty = engine.read([view], first, everything, seen.target[[image]]).cpu()
    both = Readings(empty.logit[None], empty.prob[None], empty.max_prob[None]).after(seen.readings[[image]])
    return _unchanged(both, seen.eps)[0]


def _unchanged(readings: Readings, eps: float) -> list[bool]:
    """Per row, whether neither the logit nor the probability [n, 1 + m] changes."""
    both = (unchanged(values, readings.logit, eps) for values in (readings.logit, readings.prob))
    return [logit is not None and prob is not None for logit, prob in zip(*both, strict=True)]


def _verdicts(
    metrics: Sequence[Metric],
    group: Usable,
    planned: Sequence[Planned],
    readings: Sequence[Readings],  # [n, 1 + m] of each plan, first the unperturbed image
    eps: float,
    ignored: set[int],
) -> list[Verdict]:
    """The verdicts of a group of images, in order."""
    found: dict[int, Verdict] = {image: Verdict({}, 0) for image in group.reasons}
    for p, read in zip(planned, readings, strict=True):
        for image, outcome in _outcomes(p, read, eps, ignored, group.reasons):
            maps = p.spans[image].stop - p.spans[image].start
            found[image].outcomes[p.metric.name] = outcome
            found[image].asked += maps * (p.plan.masks.shape[1] + p.plan.n_unperturbed)
    for image, verdict in found.items():
        verdict.asked = max(verdict.asked, 1)  # the image as it is was read in any case
        for metric in metrics:
            if metric.name not in verdict.outcomes:
                verdict.outcomes[metric.name] = no_outcome(group.reasons[image])
    return list(found.values())


def _outcomes(
    planned: Planned, readings: Readings, eps: float, ignored: set[int], reasons: dict[int, list[str | None]]
) -> Iterator[tuple[int, Outcome]]:
    """Each image of ``planned`` and its scores, at the positions of their maps.

    A score without meaning is NaN and has a reason.
    """
    for rows, spans in planned.pieces():
        scores, details, found = _scored(planned, rows, readings[rows], eps)
        for image, span in spans.items():
            why = found[span]
            if image in ignored and planned.metric.reading(readings[rows]) is None:
                why = [reason or UNCHANGED for reason in why]
            own = {name: values[span] for name, values in details.items()}
            yield image, outcome_of(scores[span], own, why, reasons[image])


def _scored(
    planned: Planned, rows: slice, readings: Readings, eps: float
) -> tuple[Tensor, dict[str, Tensor], list[str | None]]:
    """Scores [n] and details of some rows, and per row the reason why its score has no meaning, or None."""
    metric, maps, plan = planned.metric, planned.maps[rows], planned.plan
    if len(maps) < len(planned.maps):
        plan = rows_of(plan, rows)
    scores, details = checked_scores(metric, len(maps), *metric.score(maps.clone(), plan, readings))
    used = metric.reading(readings)
    finite = readings.logit.isfinite() & readings.prob.isfinite() if used is None else used.isfinite()
    nothing = metric.says_nothing(maps, plan, readings, eps)
    defined = scores.isfinite().tolist()
    found = [
        NOT_FINITE_OUTPUT if not ok else reason or (None if good else f"{metric.name} is not defined here")
        for ok, reason, good in zip(finite.all(1).tolist(), nothing, defined, strict=True)
    ]
    return scores, details, found
