"""The statistics of Table 1 against hand-computed values and SciPy, and the table that shows them."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

from fastfg.report import differences as report_differences
from fastfg.report import markdown_table
from fastfg.study import paired, summarize
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


def test_a_column_that_may_be_no_metric_is_not_judged():
    """A column of one's own is judged where it is named, made by compare, or beside no metric of fastfg."""
    table = scores(vanilla=[0.1, 0.2, 0.4], gated=[0.3, 0.4, 0.35])
    for judged in (summarize, paired):
        with pytest.raises(ValueError, match=r"metrics: expected the names .* as \['age'\] may be no metrics beside"):
            judged(table.assign(age=[50, 60, 70] * 2))
        with pytest.raises(ValueError, match=r"scores: expected numbers in the column 'patient', got .*metrics= names"):
            judged(table.assign(patient="a"))
        with pytest.raises(TypeError, match="metrics: expected a list of names among .* got the text 'saco'"):
            judged(table, metrics="saco")
        named = judged(table.assign(age=[50, 60, 70] * 2, patient="a"), metrics=["saco"])
        assert set(named["metric"]) == {"saco"}
        made = table.assign(own=table["saco"])
        made.attrs["metrics"] = ["saco", "pixel_flipping", "own"]
        assert set(judged(made)["metric"]) == {"saco", "pixel_flipping", "own"}
        alone = table.rename(columns={"saco": "own"}).drop(columns="pixel_flipping")
        assert set(judged(alone)["metric"]) == {"own"}
    directed = paired(table.assign(own=table["saco"]), higher_is_better={"own": True})
    assert set(directed["metric"]) == {"saco", "pixel_flipping", "own"}


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


def test_without_spread_there_is_no_test():
    constant = {"vanilla": [0.1] * 3, "gated": [0.7] * 3, "same": [0.1] * 3, "spread": [0.7, 0.8, 0.9]}
    assert np.var(constant["vanilla"]) > 0  # by rounding
    summary = summarize(scores(**constant)).set_index(["variant", "metric"])
    for variant in ("gated", "same"):
        assert math.isnan(summary.loc[(variant, "saco")]["p"])
        assert summary.loc[(variant, "saco")]["stars"] == ""
    assert summary.loc[("spread", "saco")]["p"] == pytest.approx(
        stats.ttest_ind(constant["spread"], constant["vanilla"], equal_var=False).pvalue
    )


def test_the_variant_to_test_against_must_be_there():
    table = scores(plain=[0.1, 0.2], gated=[0.3, 0.4])
    with pytest.raises(ValueError, match=r"against: expected one of \['plain', 'gated'\], got 'vanilla'"):
        summarize(table)
    assert not math.isnan(summarize(table, against="plain").set_index("variant")["p"]["gated"].iloc[0])


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "a\\|b",
        "two\nlines",
        "two\r\n lines",
        "*a* **b**",
        "<b>a</b>",
        "&lt;",
        "`a`",
        "_a_ __b__",
        "[a](b)",
        "~~a~~",
    ],
)
def test_names_are_shown_as_they_are(name):
    table = scores(**{name: [0.1, 0.2, 0.15], "gated": [0.3, 0.4, 0.35]}).rename(columns={"pixel_flipping": name})
    text = markdown_table(summarize(table, against=name, metrics=["saco", name]), against=name)
    lines, shown = text.splitlines(), " ".join(name.split())
    assert len(lines) == 6
    (table_tokens, footnote) = cells(text)
    assert table_tokens[:3] == ["", "SaCo ↑", shown]
    assert table_tokens[3] == shown
    assert f"against {shown}, * p < .05, ** p < .01, *** p < .001." in footnote


def cells(text):
    """The text of each cell of a Markdown table, and of the paragraph below it, as GitHub shows them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    kinds = {"strong_open", "strong_close", "text", "text_special"}
    shown = []
    for token in tokens:
        if token.type == "inline":
            assert {child.type for child in token.children} <= kinds
            shown.append("".join(child.content for child in token.children))
    return shown[:-1], shown[-1]


def test_ordinary_names_are_unchanged():
    names = ("vanilla", "SAE gate", "shuffled decoder", "no SAE (g·x)", "top_k 1.5+2-3 #1!")
    table = markdown_table(summarize(scores(**{name: [0.1, 0.2] for name in names})))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:7]] == [f"| {name}" for name in names]


def test_a_control_that_wins_is_shown_winning():
    vanilla = np.array([0.1, 0.2, 0.15] * 3)
    found = scores(**{"vanilla": vanilla, "gated": vanilla + 0.2, "con|trol": vanilla[::-1] + 0.7})
    table = markdown_table(summarize(found), paired=paired(found))
    assert "**" not in markdown_table(summarize(found)).replace("\\*", "")  # bold needs the paired test
    line = next(line for line in table.splitlines() if "con" in line)
    assert line.startswith("| con\\|trol | **0.850 ± 0.014\\*\\*\\***")
    assert line.count("**0.850") == 1
    assert "SaCo ↑" in table
    assert "Pixel Flipping ↓" in table
    best_of_flipping = line.split("|")[-2]
    assert best_of_flipping.strip().startswith("**-0.850")


def test_the_best_mean_is_bold_only_where_the_difference_is_real():
    vanilla = np.linspace(0, 1, 10)
    found = scores(vanilla=vanilla, chance=vanilla[::-1] + 0.05, gated=vanilla + np.linspace(0.01, 0.02, 10))
    summary, differences = summarize(found), paired(found)
    assert summary.set_index(["metric", "variant"])["mean"]["saco"].idxmax() == "chance"
    assert "**" not in markdown_table(summary, paired=differences).replace("\\*", "")
    real = found[found["variant"] != "chance"]
    assert markdown_table(summarize(real), paired=paired(real)).count("**0.515") == 1


def test_means_of_different_images_are_not_bold():
    """random is better on every common image, and each variant lacks others."""
    own = np.linspace(0, 6, 60)
    noise = np.tile([0.01, -0.01, 0.0], 20)
    gated, random = own + 0.1 + noise, own + 0.3 + noise
    bold = scores(vanilla=own, gated=gated.copy(), random=random)
    assert "**" not in rows_of(bold, "gated").replace("\\*", "")
    gated[:10], random[-10:] = math.nan, math.nan
    assert "**" not in rows_of(scores(vanilla=own, gated=gated, random=random), "gated", "random").replace("\\*", "")
    lost = [np.where(np.arange(60) < 10, math.nan, values) for values in (own, own + 0.1 + noise)]
    assert "**" in rows_of(scores(vanilla=lost[0], gated=lost[1]), "gated").replace("\\*", "")  # the same images


def test_a_variant_without_any_score_does_not_decide_what_is_bold():
    own, noise = np.linspace(0, 1, 30), np.tile([0.01, -0.01, 0.0], 10)
    found = scores(vanilla=own, gated=own + 0.1 + noise, blank=[math.nan] * 30)
    assert "**" in rows_of(found, "gated").replace("\\*", "")


def rows_of(found, *variants):
    """The lines of ``variants`` in the first table of means."""
    lines = markdown_table(summarize(found), paired=paired(found)).splitlines()
    return "\n".join(line for name in variants for line in lines[:6] if line.startswith(f"| {name} "))


def test_differences_in_plain_words():
    vanilla = np.linspace(0.2, 0.5, 12)
    noise = np.array([0.01, -0.01] * 6)
    found = scores(vanilla=vanilla, gated=vanilla + 0.2 + noise, chance=vanilla + 2 * noise, blank=[math.nan] * 12)
    table = paired(found)
    saco, flipping = report_differences(table)
    gated, chance = (table.set_index(["metric", "variant"]).loc[("saco", name)] for name in ("gated", "chance"))
    assert saco == (
        f"SaCo. Better than vanilla: gated (0.200 [{gated['low']:.3f}, {gated['high']:.3f}], Holm p = .002, n = 12). "
        f"No real difference: chance (an effect below {chance['mde']:.3f} is often missed). "
        "Not tested: blank (no image has both scores)."
    )
    assert flipping.startswith("Pixel Flipping. Better than vanilla: gated (-0.200")
    text = markdown_table(summarize(found), paired=table)
    assert f"- {saco}".replace("[", "\\[").replace("]", "\\]") in text
    assert "| gated | 0.200 \\[" in text
    few = report_differences(paired(scores(vanilla=[0.0] * 4, gated=[1.0, 2.0, 1.5, 1.2])))
    assert few[0].startswith(
        "SaCo, Pixel Flipping. Cannot tell: gated (4 pairs give no p below 0.12, and Holm corrects for 2 comp"
    )


def test_many_metrics_and_variants_fit_a_terminal():
    """Eight variants and fifteen metrics: tables of three metrics, and one of differences per metric."""
    random = np.random.default_rng(0)
    names = ["vanilla", *(f"shuffled decoder {n}" for n in range(7))]
    found = scores(**{name: random.normal(0.5, 0.2, 40) for name in names}).drop(columns=["saco", "pixel_flipping"])
    found = found.assign(**{f"metric {n}": random.normal(0.5, 0.2 * 10 ** (-n), len(found)) for n in range(15)})
    text = markdown_table(summarize(found), paired=paired(found, n_permutations=9_999, n_resamples=999))
    terminal = Console(width=100, file=io.StringIO())
    terminal.print(Markdown(text))
    rows = [line for line in terminal.file.getvalue().splitlines() if line.startswith(" shuffled decoder")]
    assert len(rows) == 7 * (5 + 15)  # no row is broken
    assert sum("no real difference" in row for row in rows) > 90
    assert text.count("| --- |") == 5 + 15


def test_the_table_names_the_variant_that_the_statistics_compare_with():
    vanilla = np.linspace(0.2, 0.5, 12)
    found = scores(vanilla=vanilla, gated=vanilla + 0.2 + np.linspace(0, 0.1, 12))
    summary, table = summarize(found, "gated"), paired(found, "gated")
    text = markdown_table(summary, paired=table)
    assert "finds it better than gated (Holm" in text
    assert "Worse than gated: vanilla" in text
    with pytest.raises(ValueError, match="against: expected 'gated', which the statistics compare with, got 'vanilla'"):
        markdown_table(summary, "vanilla", table)
    with pytest.raises(
        ValueError, match=r"paired: expected the same variant .* as in summary, got \['vanilla', 'gated'\]"
    ):
        markdown_table(summarize(found), paired=table)
    for lost in (summary, table):
        lost.attrs.clear()  # as a CSV file does
    assert "better than gated (Holm" in markdown_table(summary, "gated", table)
    with pytest.raises(ValueError, match="against: expected the variant that paired compares with, got 'vanilla'"):
        markdown_table(summary, paired=table)


def test_the_note_names_the_family():
    found = scores(vanilla=np.zeros(6), gated=np.linspace(0.1, 0.3, 6))
    summary, table = summarize(found), paired(found, family="metric")
    assert "corrected for the comparisons of one metric with vanilla. Welch" in markdown_table(summary, paired=table)
    assert "corrected for all 2 comparisons with vanilla. Welch" in markdown_table(summary, paired=paired(found))
    table.attrs.clear()
    assert "corrected. Welch" in markdown_table(summary, paired=table)


def test_bold_and_arrows_follow_the_directions_that_were_given():
    vanilla = np.linspace(0.2, 0.5, 12)
    found = scores(vanilla=vanilla, gated=vanilla + 0.2 + np.linspace(0, 0.1, 12)).rename(
        columns={"pixel_flipping": "own"}
    )
    directions = {"saco": False, "own": False}
    table = paired(found, higher_is_better=directions)
    text = markdown_table(summarize(found, metrics=["saco", "own"]), paired=table)
    (vanilla_row, gated_row) = text.splitlines()[2:4]
    assert "SaCo ↓ | own ↓" in text
    assert "**" not in vanilla_row
    assert "| **-0.600 ±" in gated_row
    assert gated_row.count("**0.") == 0  # saco: lower is better now


def test_the_number_of_units_is_shown():
    found = scores(vanilla=np.zeros(12), gated=np.linspace(0.1, 0.3, 12))
    table = paired(found, groups=[i // 2 for i in range(12)])
    assert "| 12 in 6 groups |" in markdown_table(summarize(found), paired=table)


def test_very_small_and_large_numbers_keep_their_digits():
    table = markdown_table(summarize(scores(vanilla=[1e-6, 2e-6], gated=[3e-6, 4e-6])))
    assert "1.50e-06 ± 5.00e-07" in table


@pytest.mark.filterwarnings("error")
def test_scores_that_differ_by_rounding_have_no_variance():
    """SciPy warns of such samples: a control such as a centred prior has the same score on every image."""
    scores = pd.DataFrame(
        {
            "variant": ["vanilla"] * 3 + ["constant"] * 3 + ["other"] * 3,
            "saco": [1.0, 1.0 - 1e-16, 1.0 - 2e-16, 0.5, 0.5, 0.5, 0.2, 0.4, 0.6],
        }
    )
    found = summarize(scores).set_index("variant")["p"]
    assert found["constant"] != found["constant"]  # NaN: neither varies
    expected = stats.ttest_1samp([0.2, 0.4, 0.6], 1.0).pvalue
    assert found["other"] == pytest.approx(expected)


def test_no_mean_is_bold_among_means_over_other_images():
    """``few`` has scores for the easy images alone: the largest mean, and the smallest gain."""
    random = np.random.default_rng(0)
    base = random.normal(0, 1, 40)
    few = np.where(base > 0.5, base + 0.1 + random.normal(0, 0.01, 40), np.nan)
    columns = {"vanilla": base, "full": base + 0.5 + random.normal(0, 0.1, 40), "few": few}
    for given, bold in ((columns, 0), ({k: columns[k] for k in ("vanilla", "full")}, 1)):
        table = scores(**given).drop(columns="pixel_flipping")
        shown = markdown_table(summarize(table), paired=paired(table)).split("Mean ± standard error")[0]
        assert shown.count("**") == 2 * bold


def test_truth_values_are_scores():
    table = scores(vanilla=[True, True, False, True], gated=[False, True, False, False])
    table = table[["image", "variant", "saco"]].rename(columns={"saco": "pointing_game"})
    table["pointing_game"] = table["pointing_game"].astype(bool)
    assert summarize(table)["mean"].tolist() == [0.75, 0.25]
    assert paired(table)["difference"].tolist() == [-0.5]
