"""The answer of one comparison in a sentence: does a method beat the baseline, and every control?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastfg.metrics import METRICS
from fastfg.report.contents import Claim, Effect
from fastfg.study import wording
from fastfg.study.conditions import better_than, better_than_every, effects_of, strongest_control, words
from fastfg.study.paired import paired
from fastfg.study.pairs import direction_of

if TYPE_CHECKING:
    import pandas as pd


def answer(
    scores: pd.DataFrame,
    against: pd.DataFrame,
    method: str,
    *,
    baseline: str = "vanilla",
    controls: Sequence[str] = (),
    others: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Claim, dict[str, pd.DataFrame]]:
    """Whether ``method`` is better than the baseline and than every control, in at least one metric.

    A control without scores, or one that could not be tested, is not beaten. Without a control the claim does not hold.

    Args:
        scores: a table of :func:`fastfg.compare`.
        against: :func:`fastfg.study.paired` of it, against ``baseline``: the metrics to judge and their directions.
        method, baseline, controls: names of variants. The strongest control of a metric is the one that the method is
            ahead of by the least, on the images that both have.
        others: variants that are no controls. The claim does not need to beat them, and says which of them are better.
            They have a Holm correction of their own.
        seed: of the tests.

    Returns the claim, and {``method``: the paired comparison of the baseline and the controls with it} that it rests
    on. Holm's correction counts all variants and metrics of this comparison.
    """
    metrics = list(dict.fromkeys(against["metric"]))
    directions: Mapping[str, bool] = against.attrs.get("higher_is_better", {})
    judged = _of(scores, [method, baseline, *controls])
    table = paired(judged, method, metrics=metrics, higher_is_better=directions, seed=seed)
    beside = paired(_of(scores, [method, *others]), method, metrics=metrics, higher_is_better=directions, seed=seed)
    conditions, effects, passed, worse = [], [], [], dict[str, list[str]]()
    for metric in metrics:
        over, title = effects_of(table, method, metric), _title(metric)
        strongest = strongest_control(over, controls, direction_of(metric, directions))
        shown = [over[name] for name in (baseline, strongest) if name is not None]
        own = [better_than(effect, strongest=effect.against != baseline, metric=title) for effect in shown]
        own.append(better_than_every(over, controls, _scored(judged, [metric]), title))
        effects += shown
        conditions += own
        if all(condition.holds for condition in own):
            passed.append(metric)
        for name, effect in (over | effects_of(beside, method, metric)).items():
            if effect.verdict == "worse":
                worse.setdefault(name, []).append(title)
    silent = [name for name in controls if name not in _scored(judged, metrics)]
    sentence = _sentence(method, baseline, metrics, passed, effects, worse, controls, silent)
    return Claim(sentence, bool(passed), conditions, effects), {method: table}


def undecided(scores: pd.DataFrame, sentences: Sequence[str]) -> Claim:
    """What is said where no method is compared with a baseline and controls."""
    n = len(dict.fromkeys(scores["variant"]))
    if n == 1:
        return Claim(f"One variant was judged, {scores['variant'].iloc[0]}: there is nothing to compare it with.", None)
    return Claim(" ".join(sentences), None)


def _of(scores: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    found = scores.loc[scores["variant"].isin(list(variants))]
    found.attrs = dict(scores.attrs)
    return found


def _scored(scores: pd.DataFrame, metrics: Sequence[str]) -> set[str]:
    """The variants with a score in at least one of ``metrics``."""
    return set(scores.loc[scores[list(metrics)].notna().any(axis=1), "variant"])


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
    titles = ", ".join(map(_title, ahead))
    by = f"{titles}, {len(ahead)} of {len(metrics)} metrics" if ahead else f"any of {len(metrics)} metrics"
    if len(metrics) == 1:
        by = _title(metrics[0])
    said = f"{method} {'beats' if ahead else 'does not beat'} {beside} by {by}"
    if worse:
        said += f", and is {wording.worse_than(worse)}"
    said += f" ({_title(first.metric)}, {method} minus {baseline}: {words(first)})"
    if silent:
        said += f"; {wording.without_scores(silent)}"
    if passed:
        return f"{said}."
    return f"{wording.NO_CLAIM}: {'' if controls else f'{wording.NO_CONTROL}; '}{said}."
