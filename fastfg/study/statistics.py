"""Summarise scores as in the paper's Table 1: mean and standard error over images, and Welch's t-test.

What decides whether two variants differ is :func:`fastfg.study.paired`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastfg.metrics import METRICS
from fastfg.metrics.choose import RESERVED
from fastfg.study.resampling import ROUNDING, standard_error

if TYPE_CHECKING:
    import pandas as pd

KEY = ("key", "image")  # the first of these columns that is there tells pictures apart
IMAGE = ("index", "path", "image")  # the first of these columns that is there tells the images apart
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


def check_targets(scores: pd.DataFrame) -> None:
    """Raise ValueError if two variants explain different classes of an image: their scores can't be compared."""
    image = next((name for name in (*IMAGE, "key") if name in scores.columns), None)
    if image is None or "target" not in scores.columns:
        return
    several = scores.groupby(image, sort=False)["target"].nunique(dropna=False) > 1
    rows = scores.loc[scores[image].isin(several.index[several]), [image, "variant", "target"]]
    for name, own in rows.groupby(image, sort=False):
        explained = {variant: _classes(part) for variant, part in own.groupby("variant", sort=False)["target"]}
        (first, expected), *others = explained.items()
        for variant, got in others:
            if got != expected:
                raise ValueError(
                    f"scores: expected the same target in all variants of an image, got {expected} in {first!r} and "
                    f"{got} in {variant!r} for {image} {name!r}"
                )


def _classes(targets: pd.Series) -> str:
    """The different targets, as a text."""
    known = targets.dropna().unique().tolist()
    names = [str(int(one)) if isinstance(one, float) and one.is_integer() else str(one) for one in known]
    return ", ".join(sorted(names) + (["none"] if targets.isna().any() else []))


def metric_columns(
    scores: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    groups: str | Sequence[Any] | None = None,
    own: Iterable[str] = (),
) -> list[str]:
    """The columns of ``scores`` that hold metrics.

    Args:
        metrics: their names; None: all columns that are not about the image, if fastfg has metrics of these names, or
            ``compare`` was given them, or they are among ``own``, or no column is such a metric.
        groups: the column of the groups, if it is one.

    Raises ValueError for unknown columns, for those without numbers, and where a column may be no metric.
    """
    from pandas.api.types import is_numeric_dtype

    others = {*RESERVED, groups} if isinstance(groups, str) else set(RESERVED)
    found = [name for name in scores.columns if name not in others]
    if isinstance(metrics, str):
        raise TypeError(f"metrics: expected a list of names among {found}, got the text {metrics!r}")
    chosen = found if metrics is None else list(metrics)
    for name in chosen:
        if name not in found:
            raise ValueError(f"metrics: expected some of {found}, got {name!r}")
        if not is_numeric_dtype(scores[name]):
            hint = f" (metrics= names the columns to judge, among {found})" if metrics is None else ""
            raise ValueError(f"scores: expected numbers in the column {name!r}, got {scores[name].dtype}{hint}")
    known = {*METRICS, *scores.attrs.get("metrics", ()), *own}
    extra = [name for name in chosen if name not in known]
    if metrics is None and 0 < len(extra) < len(chosen):
        raise ValueError(
            f"metrics: expected the names of the columns to judge, as {extra} may be no metrics beside "
            f"{[name for name in chosen if name in known]}, got None"
        )
    return chosen


def key_column(scores: pd.DataFrame) -> str | None:
    """The column with the images' keys, which are equal where two images are the same picture; None without one."""
    return next((name for name in KEY if name in scores.columns), None)


def depends_on_scale(metric: str) -> bool:
    """Whether the scores of fastfg's ``metric`` change with the unit of the maps."""
    name = metric_of(metric)
    return name in METRICS and METRICS[name].depends_on_scale


def metric_of(column: str) -> str:
    """The metric of a column, which may name the mode too, as in ``srg (removed)``."""
    return column.split(" (")[0]


def summarize(scores: pd.DataFrame, against: str = "vanilla", *, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per variant and metric: ``mean``, ``se`` (standard error over images), ``n``, ``missing``, ``p`` and
    ``stars``.

    ``p`` is Welch's t-test (unequal variances, two-sided) against the variant ``against``. It is NaN for ``against``
    itself, if fewer than two images have a score, if the scores of both variants are constant (the test is not
    defined without variance), and for a metric that depends on the scale of the map. ``n`` scores are used;
    ``missing`` scores are left out. Images with the same key (the column ``key``, else ``image``) count in the mean,
    and as one image in ``se`` and ``p``.

    Args:
        scores: a table with the column ``variant`` and one column per metric, and with columns that identify the image
            (see :func:`fastfg.study.compare`).
        against: the name of one of the variants.
        metrics: the columns of the metrics; None: all. It is needed where a table has other columns of its own.

    Raises ValueError if ``against`` is not among the variants, if variants explain different classes (the column
    ``target``) of an image, if a column of ``metrics`` is not there or holds no numbers, and if ``metrics`` is None
    and a column may be no metric.
    """
    import pandas as pd

    rows = []
    check_targets(scores)
    variants, key = check_against(scores, against), key_column(scores)
    for metric in metric_columns(scores, metrics):
        samples = {name: _sample(scores.loc[scores["variant"] == name], metric, key) for name in variants}
        for variant, own in samples.items():
            p = _welch(own, samples[against]) if variant != against and not depends_on_scale(metric) else float("nan")
            rows.append(
                {"variant": variant, "metric": metric, "mean": own.mean, "se": own.error, "n": own.n}
                | {"missing": own.missing, "p": p, "stars": stars(p)}
            )
    table = pd.DataFrame(rows, columns=["variant", "metric", "mean", "se", "n", "missing", "p", "stars"])
    table.attrs["against"] = against
    return table


class _Sample(NamedTuple):
    """The scores of one variant: their mean, its standard error, and what they were computed from.

    Attributes:
        n: scores. missing: images without one. different: images with a score and with different keys.
        deviation: the standard deviation over these, 0 where the scores differ by rounding alone.
    """

    n: int
    missing: int
    different: int
    mean: float
    error: float
    deviation: float


def _sample(rows: pd.DataFrame, metric: str, key: str | None) -> _Sample:
    """``rows`` of one variant, in numbers."""
    import pandas as pd

    there = rows[rows[metric].notna()]
    values, n = there[metric].astype(float), len(there)
    missing, mean = len(rows) - n, float(values.mean()) if n else float("nan")
    again = 0 if key is None else int(there[key].dropna().duplicated().sum())
    if n - again < 2:
        return _Sample(n, missing, n - again, mean, float("nan"), float("nan"))
    if again:
        assert key is not None
        numbers, _ = pd.factorize(there[key])
        units = np.where(numbers < 0, np.arange(n) + n, numbers)  # without a key, an image is its own
        _, unit = np.unique(units, return_inverse=True)
        totals, counts = np.zeros((2, n - again))
        np.add.at(totals, unit, values.to_numpy(float))
        np.add.at(counts, unit, 1)
        error = float(standard_error(totals[:, None], counts[:, None])[0])
        deviation = error * (n - again) ** 0.5
    else:
        deviation = float(values.std(ddof=1))
        error = deviation / n**0.5
    flat = np.ptp(values) <= ROUNDING * abs(values).max()
    return _Sample(n, missing, n - again, mean, error, 0.0 if flat else deviation)


def _welch(one: _Sample, other: _Sample) -> float:
    """The p of Welch's t-test, two-sided. Values that differ by rounding alone have no variance."""
    from scipy import stats

    if min(one.different, other.different) < 2 or not (one.deviation or other.deviation):
        return float("nan")
    a, b = ((sample.mean, sample.deviation, sample.different) for sample in (one, other))
    return float(stats.ttest_ind_from_stats(*a, *b, equal_var=False).pvalue)
