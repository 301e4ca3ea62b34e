"""The answer of one comparison in a sentence: does a method beat the baseline, and every control?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastfg.metrics import METRICS
from fastfg.report.contents import Claim, Condition, Effect
from fastfg.study import wording
from fastfg.study.paired import paired
from fastfg.study.pairs import direction_of

if TYPE_CHECKING:
    import pandas as pd

SETTLED = {"better": True, "worse": False, "no real difference": False}
Effects = Mapping[str, Effect]  # {variant: the method minus it, in one metric}


def answer(
    scores: pd.DataFrame,
    against: pd.DataFrame,
    method: str,
    *,
    baseline: str = "vanilla",
    controls: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Claim, dict[str, pd.DataFrame]]:
    """Whether ``method`` is better than the baseline and than every control, in at least one metric.

    A control without scores, or one that could not be tested, is not beaten. Without a control the claim does not hold.

    Args:
        scores: a table of :func:`fastfg.compare`.
        against: :func:`fastfg.study.paired` of it, against ``baseline``: the metrics to judge and their directions.
        method, baseline, controls: names of variants. The strongest control of a metric is the one that the method is
            ahead of by the least, on the images that both have.
        seed: of the tests.

    Returns the claim, and {``method``: the paired comparison of the baseline and the controls with it} that it rests
    on. Holm's correction counts all variants and metrics of this comparison.
    """
    metrics = list(dict.fromkeys(against["metric"]))
    directions: Mapping[str, bool] = against.attrs.get("higher_is_better", {})
    judged = scores.loc[scores["variant"].isin([method, baseline, *controls])]
    judged.attrs = dict(scores.attrs)
    table = paired(judged, method, metrics=metrics, higher_is_better=directions, seed=seed)
    names = list(dict.fromkeys(table["variant"]))
    conditions, effects, passed, worse = [], [], [], dict[str, list[str]]()
    for metric in metrics:
        over = {name: Effect.of(table, name, metric, method).reversed() for name in names}
        strongest = _strongest(over, controls, direction_of(metric, directions))
        shown = [over[name] for name in (baseline, strongest) if name is not None]
        own = [_condition(effect, effect.against != baseline) for effect in shown]
        scored = judged.loc[judged[metric].notna(), "variant"]
        own.append(_every(over, controls, metric, set(scored)))
        effects += shown
        conditions += own
        if all(condition.holds for condition in own):
            passed.append(metric)
        for name in names:
            if over[name].verdict == "worse":
                worse.setdefault(name, []).append(_title(metric))
    there = set(judged.loc[judged[metrics].notna().any(axis=1), "variant"])
    silent = [name for name in controls if name not in there]
    sentence = _sentence(method, baseline, metrics, passed, effects, worse, controls, silent)
    return Claim(sentence, bool(passed), conditions, effects), {method: table}


def undecided(scores: pd.DataFrame, sentences: Sequence[str]) -> Claim:
    """What is said where no method is compared with a baseline and controls."""
    n = len(dict.fromkeys(scores["variant"]))
    if n == 1:
        return Claim(f"One variant was judged, {scores['variant'].iloc[0]}: there is nothing to compare it with.", None)
    return Claim(" ".join(sentences), None)


def _strongest(over: Effects, controls: Sequence[str], higher_is_better: bool | None) -> str | None:
    """The control with the smallest gain of the method over it; None if no gain or no direction is known."""
    if higher_is_better is None:
        return None
    ahead = {name: over[name].difference * (1 if higher_is_better else -1) for name in controls if name in over}
    known = [name for name, gain in ahead.items() if gain == gain]
    return min(known, key=ahead.__getitem__, default=None)


def _condition(effect: Effect, strongest: bool) -> Condition:
    """Whether the method is better than the baseline or the strongest control."""
    text = wording.better_than(effect.against, strongest=strongest, metric=_title(effect.metric))
    return Condition(text, SETTLED.get(effect.verdict), f"{_words(effect)}: {effect.verdict}")


def _every(over: Effects, controls: Sequence[str], metric: str, scored: set[str]) -> Condition:
    """Whether the method is better than each control. ``scored``: the variants that have scores in ``metric``."""
    text = wording.better_than("every control", metric=_title(metric))
    if not controls:
        return Condition(text, False, wording.NO_CONTROL)
    left = [name for name in controls if name not in over or over[name].verdict != "better"]
    why = [
        f"{name}: {_words(over[name])}: {over[name].verdict}" if name in scored else f"{name}, which has no scores"
        for name in left
    ]
    return Condition(text, not left, f"not better than {'; '.join(why)}" if left else f"{len(controls)} controls")


def _words(effect: Effect) -> str:
    return wording.effect(effect.difference, effect.low, effect.high, effect.p, effect.n, effect.groups)


def _title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric


def _sentence(
    method: str,
    baseline: str,
    metrics: Sequence[str],
    passed: Sequence[str],
    effects: Sequence[Effect],
    worse: Mapping[str, Sequence[str]],
    controls: Sequence[str],
    silent: Sequence[str],
) -> str:
    """The answer. ``silent``: the controls without any score."""
    over = [effect for effect in effects if effect.against == baseline]
    beside = f"{baseline} and every control" if controls else baseline
    ahead = passed if controls else [effect.metric for effect in over if effect.verdict == "better"]
    first = next(effect for effect in over if effect.metric == (ahead or metrics)[0])
    by = f"{', '.join(map(_title, ahead))}, {len(ahead)} of" if ahead else "any of"
    said = f"{method} {'beats' if ahead else 'does not beat'} {beside} by {by} {len(metrics)} metrics"
    if worse:
        said += f", and is {wording.worse_than(worse)}"
    said += f" ({_title(first.metric)}, {method} minus {baseline}: {_words(first)})"
    if silent:
        said += f"; {wording.without_scores(silent)}"
    if passed:
        return f"{said}."
    return f"{wording.NO_CLAIM}: {'' if controls else f'{wording.NO_CONTROL}; '}{said}."
