"""The conditions that claims share: a method is better than the baseline, the strongest control and every control."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from fastfg.report.contents import Condition, Effect
from fastfg.study import wording

if TYPE_CHECKING:
    import pandas as pd

SETTLED = {"better": True, "worse": False, "no real difference": False}  # other verdicts settle nothing
Effects = Mapping[str, Effect]  # {variant: the method minus it, in one metric}


def effects_of(table: pd.DataFrame, method: str, metric: str) -> dict[str, Effect]:
    """{variant: ``method`` minus it}. ``table``: :func:`fastfg.study.paired` of the others against ``method``."""
    names = table.loc[table["metric"] == metric, "variant"]
    return {str(name): Effect.of(table, str(name), metric, method).reversed() for name in names}


def strongest_control(over: Effects, controls: Sequence[str], higher_is_better: bool | None = True) -> str | None:
    """The control with the smallest gain of the method over it; None if no gain or no direction is known."""
    if higher_is_better is None:
        return None
    gains = {name: over[name].difference * (1 if higher_is_better else -1) for name in controls if name in over}
    known = [name for name, gain in gains.items() if gain == gain]
    return min(known, key=gains.__getitem__, default=None)


def better_than(effect: Effect, *, strongest: bool = False, metric: str = "") -> Condition:
    """Whether the method is better than the variant that ``effect`` is against, by the paired test.

    Args:
        strongest: whether that is the strongest control.
        metric: the metric's title, where a claim has several.
    """
    text = wording.better_than(effect.against, strongest=strongest, metric=metric)
    return Condition(text, SETTLED.get(effect.verdict), found(effect))


def better_than_every(over: Effects, controls: Sequence[str], scored: Collection[str], metric: str = "") -> Condition:
    """Whether the method is better than each control that was asked for; one that was not tested is not beaten.

    Args:
        scored: the variants that have scores in the metric.
        metric: its title, where a claim has several.
    """
    text = wording.better_than("every control", metric=metric)
    if not controls:
        return Condition(text, False, wording.NO_CONTROL)
    left = [name for name in controls if name not in over or over[name].verdict != "better"]
    if not left:
        least = min((over[name] for name in controls), key=lambda effect: effect.n)
        on = f", each on at least {least.n} of {least.n + least.missing} images" if least.missing else ""
        return Condition(text, True, f"{len(controls)} control{'s' * (len(controls) != 1)}{on}")
    why = [f"{name}: {found(over[name])}" if name in scored else f"{name}, which has no scores" for name in left]
    return Condition(text, False, f"not better than {'; '.join(why)}")


def found(effect: Effect) -> str:
    """What the paired test found: the difference, the verdict, and why there is none."""
    return f"{words(effect)}: {effect.verdict}" + (f" ({effect.reason})" if effect.reason else "")


def words(effect: Effect) -> str:
    """The difference with its interval, p value and number of images."""
    e = effect
    return wording.effect(e.difference, e.low, e.high, e.p, e.n, e.groups, e.missing)
