"""Sign-flip tests, bootstrap intervals and detectable effects for mean differences, over images or over groups.

Letters: ``G`` groups (images, where each image is a group of its own), ``K`` comparisons. A comparison enters as
``totals`` [G, K], the sum of the differences per group, and ``counts`` [G, K], the number of differences per group. Its
mean difference is ``sum(totals) / sum(counts)``. Groups without a difference have a count of 0. All arrays are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

ALPHA, POWER = 0.05, 0.8
EXACT = 16  # up to this number of groups, all sign patterns are tried
ROUNDING = 1e-12  # relative; sums that differ by less are equal
CHUNK = 2**22  # numbers per block of random signs or weights


def sign_flip_p(totals: Array, n_random: int = 99_999, seed: int = 0) -> Array:
    """Two-sided p of the sign-flip test per comparison: [G, K] -> [K].

    Under the null hypothesis, each group's total is as likely to have the other sign. p is the share of sign patterns
    under which the mean is at least as far from 0 as the observed one. Up to 16 groups, all ``2**G`` patterns are
    tried. With more groups, ``b`` of ``n_random`` random patterns are as far from 0, and p is
    ``(b + 1) / (n_random + 1)``. A total of 0 has no sign, so it is left out.

    >>> import numpy as np
    >>> sign_flip_p(np.array([[1.0], [2.0], [3.0]]))  # +++ and --- are as far from 0, of 8 patterns
    array([0.25])
    """
    observed, rounding = np.abs(totals.sum(0)), ROUNDING * np.abs(totals).sum(0)
    p = np.full(totals.shape[1], np.nan)
    exact = (totals != 0).sum(0) <= EXACT
    for k in np.flatnonzero(exact):
        moved = totals[totals[:, k] != 0, k]
        p[k] = np.mean(np.abs(_all_signs(len(moved)) @ moved) >= observed[k] - rounding[k])
    rest = totals[:, ~exact]
    if rest.shape[1]:
        random, further = np.random.default_rng(seed), np.zeros(rest.shape[1])
        for rows in _chunks(n_random, len(rest)):
            signs = 2.0 * random.integers(0, 2, size=(rows, len(rest)), dtype=np.int8) - 1.0
            further += (np.abs(signs @ rest) >= (observed - rounding)[~exact]).sum(0)
        p[~exact] = (further + 1) / (n_random + 1)
    return p


def smallest_p(groups: NDArray[np.integer], n_random: int = 99_999) -> Array:
    """The smallest p that :func:`sign_flip_p` can give with this number of groups."""
    return np.maximum(2.0 ** (1.0 - groups), np.where(groups > EXACT, 1 / (n_random + 1), 0))


def bootstrap_interval(totals: Array, counts: Array, n_resamples: int = 9_999, seed: int = 0) -> Array:
    """95% bootstrap interval of the mean difference per comparison: [G, K] -> [2, K], low and high.

    Groups are drawn with replacement, whole. Plain percentiles are too narrow by ``sqrt((G - 1) / G)`` and by the
    ratio of the normal to the t quantile; the level is expanded by both. A comparison with fewer than two groups has
    no interval (NaN). Source: Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5.
    """
    interval = np.full((2, totals.shape[1]), np.nan)
    present, pattern = np.unique(counts > 0, axis=1, return_inverse=True)
    for n, used in enumerate(present.T):
        columns = np.flatnonzero(pattern.ravel() == n)
        groups = int(used.sum())
        if groups < 2:
            continue
        s, c = totals[np.ix_(used, columns)], counts[np.ix_(used, columns)]
        random, means = np.random.default_rng(seed), []
        for rows in _chunks(n_resamples, groups):
            drawn = random.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(float)
            means.append((weights @ s) / (weights @ c))
        tail = _expanded_tail(groups)
        interval[:, columns] = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return interval


def standard_error(totals: Array, counts: Array) -> Array:
    """Standard error of the mean difference per comparison: [G, K] -> [K]; NaN with fewer than two groups.

    ``sqrt(G / (G - 1) * sum_g (totals_g - counts_g * mean)**2) / sum(counts)``: with one image per group,
    ``sd / sqrt(n)``.
    """
    groups, n = (counts > 0).sum(0), counts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = ((totals - counts * (totals.sum(0) / n)) ** 2).sum(0)
        return np.where(groups > 1, np.sqrt(groups / (groups - 1) * squares) / n, np.nan)


def detectable_effect(error: float, groups: int) -> float:
    """The true mean difference that the test finds with 80% power, given the standard error; inf if there is none.

    ``error * d``, where ``d`` is the noncentrality at which a two-sided t test with ``groups - 1`` degrees of freedom
    finds a difference of the right sign with 80% power. Its level is .05. Up to 16 groups, it is the largest level
    below .05 that the sign patterns can give; with five groups or fewer there is none, and no difference can be found.
    """
    from scipy import optimize, stats

    patterns = 2 ** (groups - 1)  # each stands for itself and its negative
    level = int(ALPHA * patterns) / patterns if groups <= EXACT else ALPHA
    if level == 0:
        return float("inf")
    bound = stats.t.isf(level / 2, groups - 1)
    d = optimize.brentq(lambda d: stats.nct.sf(bound, groups - 1, d) - POWER, 0, 2 * bound + 5)
    return error * float(d)


def holm(p: Array) -> Array:
    """Holm's adjusted p values [K], for the family of all that are not NaN.

    The smallest of ``m`` values is multiplied by ``m``, the next by ``m - 1``, and so on; none is smaller than one
    before it, or larger than 1. Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    >>> import numpy as np
    >>> holm(np.array([0.01, 0.04, 0.03, np.nan]))
    array([0.03, 0.06, 0.06,  nan])
    """
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN is last
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def _expanded_tail(groups: int) -> float:
    from scipy import stats

    return float(stats.norm.cdf(np.sqrt(groups / (groups - 1)) * stats.t.ppf(ALPHA / 2, groups - 1)))


@lru_cache(maxsize=4)
def _all_signs(groups: int) -> Array:
    """All patterns of -1 and 1, [2**groups, groups]."""
    return np.asarray(1 - 2 * ((np.arange(2**groups)[:, None] >> np.arange(groups)) & 1), dtype=np.float64)


def _chunks(rows: int, width: int) -> Iterator[int]:
    """``rows`` in parts of at most ``CHUNK / width``."""
    size = max(1, CHUNK // width)
    for first in range(0, rows, size):
        yield min(size, rows - first)
