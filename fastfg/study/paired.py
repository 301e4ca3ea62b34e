"""Decide which variants differ, by tests on the differences between variants on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastfg.checks import check_seed
from fastfg.study.pairs import Pairs, direction_of, is_empty, pairs
from fastfg.study.resampling import (
    ALPHA,
    EXACT,
    ROUNDING,
    Array,
    bootstrap_interval,
    detectable_effect,
    holm,
    sign_flip_p,
    smallest_p,
    standard_error,
)
from fastfg.study.statistics import depends_on_scale, metric_columns, summarize

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    *("variant", "metric", "n", "missing", "groups", "mean", "mean_against", "difference", "low", "high"),
    *("p", "p_holm", "mde", "verdict", "p_welch", "reason"),
]


def paired(
    scores: pd.DataFrame,
    against: str = "vanilla",
    *,
    groups: str | Sequence[Any] | None = None,
    metrics: Sequence[str] | None = None,
    family: Literal["all", "metric"] = "all",
    higher_is_better: Mapping[str, bool] | None = None,
    n_permutations: int = 99_999,
    n_resamples: int = 9_999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare each variant with ``against`` on the same images: one row per variant and metric.

    Images are paired by the column ``index`` (else ``path``, else ``image``). An image counts if both variants have a
    score, and means are over images. Images of one group, such as one patient's, are not independent: with ``groups``,
    the test and the interval use whole groups. So they do for images with the same key (the column ``key``, else
    ``image``): the same picture twice is no more evidence than once, and groups that share a picture are one group. A
    difference of rounding size (1e-9 of the scores; for float32 scores, four units of their rounding) counts as 0.

    Args:
        scores: a table of :func:`fastfg.compare`.
        against: the variant to compare with.
        groups: a column of ``scores``, or one entry per image, in the order in which the images first appear. None:
            the column ``group`` if there is one, as ``compare(groups=)`` makes it. In a column, an image whose entry is
            empty (``""`` or missing) is a group by itself; of the entries, none may be empty.
        metrics: the metrics to test; None: all. A smaller family needs less correction. It is needed where the table
            has other columns with numbers.
        family: the comparisons that Holm's correction counts together: ``all`` of the call (the probability of a wrong
            ``better`` or ``worse`` anywhere in the table is at most 5%), or those of each ``metric``.
        higher_is_better: {metric: direction} for metrics of your own.
        n_permutations: random sign patterns, for more than 16 groups. n_resamples: bootstrap samples. seed: of both.

    Returns a table with the columns ``variant``, ``metric``, and

    - ``n`` (pairs), ``missing`` (images without a pair), ``groups`` (their number; without groups, that of the
      different images),
    - ``mean``, ``mean_against``, ``difference``: over the pairs,
    - ``low``, ``high``: 95% bootstrap interval of the difference,
    - ``p``, ``p_holm``: sign-flip test, two-sided, before and after Holm's correction,
    - ``mde``: the minimum detectable effect of one comparison, at 80% power and level .05,
    - ``verdict``: ``better`` or ``worse`` if ``p_holm < .05`` (``higher`` or ``lower`` if the direction is unknown),
      else ``no real difference``; ``cannot tell`` if even the clearest differences on so few images could not give
      ``p_holm < .05``; ``not tested`` if there are fewer than two pairs or groups, and for a metric that depends on
      the scale of the map (``infidelity``), which differs between variants,
    - ``p_welch``: Welch's t-test as in :func:`summarize`, for comparison with the paper,
    - ``reason``: why a value is NaN or the verdict is ``cannot tell``, else None.

    Its ``attrs`` have ``against``, ``family`` and ``higher_is_better``, which :mod:`fastfg.report` reads.

    Raises ValueError if ``against`` or a metric is not in the table, if a column may be no metric, if an image has two
    rows of the same variant or another ``target`` in another variant, if a score is infinite, and if ``groups`` does
    not give one group per image.
    docs/statistics.md explains the choices.

    >>> import pandas as pd
    >>> scores = {"vanilla": [0.1, 0.3, 0.2, 0.4, 0.1, 0.2], "gated": [0.2, 0.5, 0.3, 0.6, 0.2, 0.4]}
    >>> rows = [(i, variant, value) for variant in scores for i, value in enumerate(scores[variant])]
    >>> table = paired(pd.DataFrame(rows, columns=["index", "variant", "saco"]))
    >>> table[["variant", "n", "difference", "p", "verdict"]].round(3).to_dict("records")
    [{'variant': 'gated', 'n': 6, 'difference': 0.15, 'p': 0.031, 'verdict': 'better'}]
    """
    import pandas as pd

    if family not in ("all", "metric"):
        raise ValueError(f"family: expected 'all' or 'metric', got {family!r}")
    for name, number in (("n_permutations", n_permutations), ("n_resamples", n_resamples)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    check_seed(seed)
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if groups is None and "group" in scores.columns and not all(map(is_empty, scores["group"].unique())):
        groups = "group"
    chosen = metric_columns(scores, metrics, groups, higher_is_better or ())
    found = pairs(scores, chosen, against, groups)
    unit = "group" if groups is not None else "different image" if found.repeated else "pair"
    table = _estimates(found, unit, n_permutations, n_resamples, seed)
    welch = summarize(scores, against, metrics=chosen).set_index(["variant", "metric"])["p"]
    table["p_welch"] = [float(welch[name]) for name in found.names]
    families = [table] if family == "all" else [part for _, part in table.groupby("metric", sort=False)]
    decided = [_decide(part, higher_is_better) for part in families if len(part)]
    table = pd.concat([table[:0], *decided]).sort_index().reindex(columns=COLUMNS)
    table.attrs |= {"against": against, "family": family, "higher_is_better": dict(higher_is_better or {})}
    return table


def _estimates(found: Pairs, unit: str, n_permutations: int, n_resamples: int, seed: int) -> pd.DataFrame:
    """One row per comparison, with the columns that do not depend on the family."""
    import pandas as pd

    there = ~np.isnan(found.differences)
    totals, counts = found.by_group()
    n, groups = there.sum(0), (counts > 0).sum(0)
    error, largest = standard_error(totals, counts), np.abs(np.where(there, found.differences, 0)).max(0, initial=0)
    comparable = np.array([not depends_on_scale(metric) for _, metric in found.names], dtype=bool)
    tested = (groups > 1) & comparable
    varies = tested & (error > ROUNDING * largest)
    low, high = np.where(varies, bootstrap_interval(totals, counts, n_resamples, seed), np.nan)
    with np.errstate(invalid="ignore"):
        mean, base, difference = (
            np.where(there, values, 0).sum(0) / n for values in (found.values, found.base, found.differences)
        )
    reasons = [_reason(*row, unit) for row in zip(n, groups, comparable, varies, largest, strict=True)]
    return pd.DataFrame(found.names, columns=["variant", "metric"]).assign(
        n=n,
        missing=len(there) - n,
        groups=groups,
        mean=mean,
        mean_against=base,
        difference=difference,
        low=low,
        high=high,
        p=np.where(tested, sign_flip_p(totals, n_permutations, seed), np.nan),
        smallest_p=smallest_p(groups, n_permutations),
        mde=[detectable_effect(e, int(g)) if v else np.nan for e, g, v in zip(error, groups, varies, strict=True)],
        unit=unit,
        reason=pd.Series(reasons, dtype=object),
    )


def _reason(n: int, groups: int, comparable: bool, varies: bool, largest: float, unit: str) -> str | None:
    """Why a comparison has no interval, or None."""
    if n == 0:
        return "no image has both scores"
    if not comparable:
        return "the score depends on the scale of the map, and each variant has its own"
    if groups == 1:
        return f"only one {unit}: a test needs at least two"
    if varies:
        return None
    return "the differences do not vary" if largest else "all differences are 0"


def _decide(rows: pd.DataFrame, higher_is_better: Mapping[str, bool] | None) -> pd.DataFrame:
    """``rows``, all of one family, with ``p_holm``, ``verdict`` and the final ``reason``."""
    import pandas as pd

    p = rows["p"].to_numpy()
    adjusted, verdicts, reasons = holm(p), [], []
    for k, row in enumerate(rows.to_dict("records")):
        verdict, reason = "no real difference", row["reason"]
        if np.isnan(p[k]):
            verdict = "not tested"
        elif adjusted[k] < ALPHA:
            verdict = _direction(row["difference"] > 0, direction_of(row["metric"], higher_is_better))
        elif reason != "all differences are 0" and not _within_reach(p, k, row["smallest_p"]):
            verdict = "cannot tell"
            what = f"{row['groups']} {row['unit']}s" if row["groups"] <= EXACT else "so few random sign patterns"
            n = int(np.isfinite(p).sum())
            few = f"{what} give no p below {row['smallest_p']:.2g}, and Holm corrects for {n} comparison{'s' * (n > 1)}"
            reason = f"{reason}; {few}" if reason else few
        verdicts.append(verdict)
        reasons.append(reason)
    return rows.assign(p_holm=adjusted, verdict=verdicts, reason=pd.Series(reasons, rows.index, dtype=object))


def _direction(higher: bool, higher_is_better: bool | None) -> str:
    if higher_is_better is None:
        return "higher" if higher else "lower"
    return "better" if higher == higher_is_better else "worse"


def _within_reach(p: Array, k: int, smallest: float) -> bool:
    """Whether comparison ``k`` would be significant after Holm's correction, had it the smallest p there can be."""
    best = p.copy()
    best[k] = smallest
    return bool(holm(best)[k] < ALPHA)
