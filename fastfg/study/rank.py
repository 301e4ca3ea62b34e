"""Rank a variant among its shuffled controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastfg.study.pairs import SAME, direction_of, image_column
from fastfg.study.statistics import metric_columns

if TYPE_CHECKING:
    import pandas as pd


def rank_test(
    scores: pd.DataFrame,
    variant: str,
    shuffled: Sequence[str],
    *,
    metrics: Sequence[str] | None = None,
    higher_is_better: Mapping[str, bool] | None = None,
) -> pd.DataFrame:
    """Rank the mean of ``variant`` among the means of shuffled controls: one row per metric.

    If the decoder does not matter, the real one is as likely to have each rank among ``n`` shuffled ones. With
    ``rank - 1`` controls at least as good as ``variant``, ``p = rank / (n + 1)``, one-sided. It is never below
    ``1 / (n + 1)``: 19 seeds can give .05, 99 seeds .01. The p values are not corrected for the number of metrics.

    Args:
        scores: a table of :func:`fastfg.compare`.
        variant: the real one. shuffled: the names of the variants with different ``Gate.shuffle_seed``.
        metrics: the metrics to rank; None: all.
        higher_is_better: {metric: direction}; needed for metrics of your own.

    Returns a table with the columns ``metric``, ``n_images`` (with a score for all of these variants), ``missing``,
    ``mean`` (of ``variant``), ``best_shuffled`` (the best mean of a control), ``rank`` (1 is the best), ``n_shuffled``,
    ``p``, and ``reason``: why they are NaN (no image has all scores), or None. Raises ValueError if a variant is not in
    the table or is named twice, and if the direction of a metric is unknown.

    >>> import pandas as pd
    >>> means = {"real": 0.5, "shuffled 1": 0.4, "shuffled 2": 0.6, "shuffled 3": 0.1}
    >>> scores = pd.DataFrame([(0, name, mean) for name, mean in means.items()], columns=["index", "variant", "saco"])
    >>> rank_test(scores, "real", ["shuffled 1", "shuffled 2", "shuffled 3"])[["metric", "rank", "p"]].values.tolist()
    [['saco', 2.0, 0.5]]
    """
    import pandas as pd

    names, there = [variant, *shuffled], list(dict.fromkeys(scores["variant"]))
    if isinstance(shuffled, str) or not shuffled:
        raise ValueError(f"shuffled: expected the names of at least one variant, got {shuffled!r}")
    for name in names:
        if name not in there:
            raise ValueError(f"{'variant' if name == variant else 'shuffled'}: expected one of {there}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"shuffled: expected different variants, none of them {variant!r}, got {list(shuffled)}")
    image, rows = image_column(scores), []
    for metric in metric_columns(scores, metrics, own=higher_is_better or ()):
        direction = direction_of(metric, higher_is_better)
        if direction is None:
            raise ValueError(f"higher_is_better: expected an entry for {metric!r}, got none")
        wide = scores.pivot(index=image, columns="variant", values=metric)[names]
        means = wide.dropna().mean()
        n, others = len(wide.dropna()), means.drop(variant)
        row: dict[str, Any] = {"metric": metric, "n_images": n, "missing": len(wide) - n, "mean": means[variant]}
        row |= {"best_shuffled": others.max() if direction else others.min(), "rank": float("nan")}
        row |= {"n_shuffled": len(others), "p": float("nan"), "reason": None}
        if n:
            ahead = others - means[variant] if direction else means[variant] - others
            as_good = ahead >= -SAME * wide.dropna().abs().stack().median()  # means that differ by rounding are tied
            row["rank"] = 1.0 + as_good.sum()
            row["p"] = row["rank"] / len(names)
        else:
            row["reason"] = "no image has a score for all of these variants"
        rows.append(row)
    return pd.DataFrame(rows)
