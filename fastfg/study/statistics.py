"""Summarise scores as in the paper's Table 1: mean and standard error over images, and Welch's t-test.

What decides whether two variants differ is :func:`fastfg.study.paired`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastfg.metrics.choose import RESERVED
from fastfg.study.resampling import ROUNDING

if TYPE_CHECKING:
    import pandas as pd

STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def stars(p: float) -> str:
    """``***`` below .001, ``**`` below .01, ``*`` below .05; nothing for NaN."""
    return next((mark for bound, mark in STARS if p < bound), "")


def check_against(scores: pd.DataFrame, against: str) -> list[str]:
    """The variants of ``scores``. Raises ValueError if ``against`` is not one of them."""
    variants = list(dict.fromkeys(scores["variant"]))
    if against not in variants:
        raise ValueError(f"against: expected one of {variants}, got {against!r}")
    return variants


def summarize(scores: pd.DataFrame, against: str = "vanilla") -> pd.DataFrame:
    """One row per variant and metric: ``mean``, ``se`` (standard error over images), ``n``, ``missing``, ``p`` and
    ``stars``.

    ``p`` is Welch's t-test (unequal variances, two-sided) against the variant ``against``. It is NaN for ``against``
    itself, if fewer than two images have a score, and if the scores of both variants are constant: the test is not
    defined without variance. ``n`` scores are used; ``missing`` scores are left out.

    Args:
        scores: a table with the column ``variant`` and one column per metric, and with columns that identify the image
            (see :func:`fastfg.study.compare`).
        against: the name of one of the variants.

    Raises ValueError if ``against`` is not among the variants.
    """
    import pandas as pd

    rows = []
    variants = check_against(scores, against)
    for metric in (name for name in scores.columns if name not in RESERVED):
        base = scores.loc[scores["variant"] == against, metric].dropna()
        for variant in variants:
            column = scores.loc[scores["variant"] == variant, metric]
            values = column.dropna()
            p = _welch(values, base) if variant != against else float("nan")
            se = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            mean = float(values.mean()) if len(values) else float("nan")
            rows.append(
                {"variant": variant, "metric": metric, "mean": mean, "se": se, "n": len(values)}
                | {"missing": len(column) - len(values), "p": p, "stars": stars(p)}
            )
    return pd.DataFrame(rows)


def _welch(values: pd.Series, base: pd.Series) -> float:
    """The p of Welch's t-test, two-sided. Values that differ by rounding alone have no variance."""
    from scipy import stats

    if min(len(values), len(base)) < 2:
        return float("nan")
    spread = [0.0 if np.ptp(v) <= ROUNDING * abs(v).max() else float(v.std(ddof=1)) for v in (values, base)]
    if not any(spread):
        return float("nan")
    sizes, means = (len(values), len(base)), (float(values.mean()), float(base.mean()))
    test = stats.ttest_ind_from_stats(means[0], spread[0], sizes[0], means[1], spread[1], sizes[1], equal_var=False)
    return float(test.pvalue)
