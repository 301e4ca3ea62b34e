"""The answer of one comparison in a sentence: does a method beat the baseline, and every control?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastfg.metrics import METRICS
from fastfg.report.contents import Claim, Condition, Effect
from fastfg.study import wording
from fastfg.study.paired import paired
from fastfg.study.pairs import direction_of

if TYPE_CHECKING:
    import pandas as pd

SETTLED = {"better": True, "worse": False, "no real difference": False}


def answer(
    scores: pd.DataFrame,
    against: pd.DataFrame,
    method: str,
    *,
    baseline: str = "vanilla",
    controls: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Claim, dict[str, pd.DataFrame]]:
    """Whether ``method`` is better than the baseline and than the strongest control, in at least one metric.

    Args:
        scores: a table of :func:`fastfg.compare`.
        against: :func:`fastfg.study.paired` of it, against ``baseline``.
        method, baseline, controls: names of variants. The strongest control of a metric has the best mean.
        seed: of the tests against the controls.

    Returns the claim, and {control: the paired comparison of ``method`` with it} for the controls that it rests on.
    Holm's correction counts all metrics of the comparison with a control.
    """
    metrics = list(dict.fromkeys(against["metric"]))
    strongest = {metric: _strongest(against, metric, controls) for metric in metrics}
    tables: dict[str, Any] = {}
    for name in dict.fromkeys(name for name in strongest.values() if name is not None):
        two = scores.loc[scores["variant"].isin([method, name])]
        two.attrs = dict(scores.attrs)
        tables[name] = paired(two, name, metrics=metrics, seed=seed)
    conditions, effects, passed = [], [], []
    for metric in metrics:
        over = Effect.of(against, method, metric, baseline)
        effects.append(over)
        own = [_condition(over)]
        if (control := strongest[metric]) is not None:
            effects.append(Effect.of(tables[control], method, metric, control))
            own.append(_condition(effects[-1], strongest=True))
        conditions += own
        if all(condition.holds for condition in own):
            passed.append(metric)
    return Claim(
        _sentence(method, baseline, metrics, passed, effects, bool(controls)), bool(passed), conditions, effects
    ), tables


def undecided(scores: pd.DataFrame, sentences: Sequence[str]) -> Claim:
    """What is said where no method is compared with a baseline and controls."""
    n = len(dict.fromkeys(scores["variant"]))
    if n == 1:
        return Claim(f"One variant was judged, {scores['variant'].iloc[0]}: there is nothing to compare it with.", None)
    return Claim(" ".join(sentences), None)


def _strongest(against: pd.DataFrame, metric: str, controls: Sequence[str]) -> str | None:
    """The control with the best mean of ``metric``; None without controls, or if the direction is not known."""
    rows = against.loc[(against["metric"] == metric) & against["variant"].isin(list(controls))]
    means = rows.set_index("variant")["mean"].dropna()
    own: Mapping[str, bool] = against.attrs.get("higher_is_better", {})
    direction = direction_of(metric, own)
    if not len(means) or direction is None:
        return None
    return str(means.idxmax() if direction else means.idxmin())


def _condition(effect: Effect, strongest: bool = False) -> Condition:
    text = wording.better_than(effect.against, strongest=strongest, metric=_title(effect.metric))
    return Condition(text, SETTLED.get(effect.verdict), f"{_words(effect)}: {effect.verdict}")


def _words(effect: Effect) -> str:
    return wording.effect(effect.difference, effect.low, effect.high, effect.p, effect.n)


def _title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric


def _sentence(
    method: str, baseline: str, metrics: Sequence[str], passed: Sequence[str], effects: Sequence[Effect], controls: bool
) -> str:
    beside = f"{baseline} and its strongest control" if controls else baseline
    first = next(e for e in effects if e.metric == (passed or metrics)[0] and e.against == baseline)
    titles = [_title(name) for name in passed]
    effect = f"{_title(first.metric)}, {method} minus {baseline}: {_words(first)}"
    if not passed:
        none = f"{method} does not beat {beside} by any of {len(metrics)} metrics"
        return f"{wording.NO_CLAIM}: {none} ({effect})."
    return f"{method} beats {beside} by {', '.join(titles)}, {len(passed)} of {len(metrics)} metrics ({effect})."
