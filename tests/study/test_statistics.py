"""The statistics of Table 1 against hand-computed values and SciPy, and the table that shows them."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fastfg.report import markdown_table
from fastfg.study import summarize
from fastfg.study.statistics import stars


def scores(**columns):
    """A tidy table from {variant: values}, the same values for SaCo and, negated, for Pixel Flipping."""
    rows = [
        {"image": str(i), "variant": variant, "target": 0, "saco": value, "pixel_flipping": -value}
        for variant, values in columns.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_mean_error_and_welch():
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, 30), random.normal(1.2, 3, 30)
    summary = summarize(scores(vanilla=a, gated=b)).set_index(["variant", "metric"])
    row = summary.loc[("gated", "saco")]
    assert row["mean"] == pytest.approx(b.mean())
    assert row["se"] == pytest.approx(b.std(ddof=1) / math.sqrt(30))
    assert row["p"] == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue)
    assert row["stars"] == stars(row["p"])
    assert math.isnan(summary.loc[("vanilla", "saco")]["p"])


def test_stars():
    assert [stars(p) for p in (0.0005, 0.005, 0.03, 0.05, math.nan)] == ["***", "**", "*", "", ""]


def test_missing_scores_are_left_out_and_counted():
    summary = summarize(scores(vanilla=[1.0, 2.0, 3.0], gated=[1.0, math.nan, 3.0])).set_index(["variant", "metric"])
    assert summary.loc[("gated", "saco")]["n"] == 2
    assert summary.loc[("gated", "saco")]["missing"] == 1
    table = markdown_table(summary.reset_index())
    assert table.count("(1 of 3 missing)") == 2  # the gated row, in both columns
    assert "missing" not in markdown_table(summarize(scores(vanilla=[1.0, 2.0], gated=[1.0, 3.0])))
    assert summary.loc[("gated", "saco")]["mean"] == 2.0
    one = summarize(scores(vanilla=[1.0], gated=[2.0])).set_index(["variant", "metric"])
    assert math.isnan(one.loc[("gated", "saco")]["se"])
    assert math.isnan(one.loc[("gated", "saco")]["p"])


def test_a_control_that_wins_is_shown_winning():
    summary = summarize(
        scores(**{"vanilla": [0.1, 0.2, 0.15], "gated": [0.3, 0.4, 0.35], "con|trol": [0.9, 0.8, 0.85]})
    )
    table = markdown_table(summary)
    line = next(line for line in table.splitlines() if "con" in line)
    assert line.startswith("| con\\|trol | **0.850 ± 0.029\\*\\*\\***")
    assert line.count("**0.850") == 1
    assert "SaCo ↑" in table
    assert "Pixel Flipping ↓" in table
    best_of_flipping = line.split("|")[-2]
    assert best_of_flipping.strip().startswith("**-0.850")
