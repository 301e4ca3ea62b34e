"""The paired statistics against values worked out by hand, and against SciPy."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from fastfg.study import paired, rank_test, summarize
from fastfg.study.resampling import (
    bootstrap_interval,
    detectable_effect,
    holm,
    sign_flip_p,
    smallest_p,
    standard_error,
)

NAN = math.nan


def scores(metric="saco", **columns):
    """A table of :func:`fastfg.compare` with one metric, from {variant: one score per image}."""
    rows = [
        {"index": i, "image": f"picture {i}", "variant": variant, "target": 0, metric: value, "error": None}
        for variant, values in columns.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def one(table, **options):
    """The only row of ``paired``."""
    rows = paired(table, **options)
    assert len(rows) == 1
    return rows.iloc[0]


def test_three_differences_flipped_by_hand():
    """Sums of +-1 +-2 +-4: 7, 5, 3, 1 and their negatives. 7 is reached by 2 of 8, 5 by 4, 3 by 6, 1 by all."""
    for differences, p in (([1, 2, 4], 2 / 8), ([-1, 2, 4], 4 / 8), ([1, -2, 4], 6 / 8), ([1, 2, -4], 1.0)):
        assert sign_flip_p(np.array(differences, float)[:, None]).tolist() == [p]
        row = one(scores(vanilla=[0, 0, 0], gated=differences))
        assert (row["p"], row["difference"], row["n"], row["groups"]) == (p, sum(differences) / 3, 3, 3)


def test_two_groups_flipped_by_hand():
    """Group a has the differences 1, 2 and 3, group b -1: totals 6 and -1, sums 5, 7, -7, -5. All are as far as 5."""
    table = scores(vanilla=[0, 0, 0, 0], gated=[1, 2, -1, 3])
    row = one(table, groups=["a", "a", "b", "a"])
    assert (row["p"], row["difference"], row["groups"], row["n"]) == (1.0, 1.25, 2, 4)
    assert one(scores(vanilla=[0, 0, 0, 0], gated=[1, 2, 1, 3]), groups=list("aaba"))["p"] == 0.5
    counts = np.array([[3.0], [1.0]])
    error = standard_error(np.array([[6.0], [-1.0]]), counts)  # deviations 6 - 3 * 1.25 and -1 - 1.25
    assert error == pytest.approx(math.sqrt(2 * (2.25**2 + 2.25**2)) / 4)


def test_equal_differences_are_ties_whatever_their_rounding():
    p = sign_flip_p(np.array([[0.1, 0.2, 0.3, 0.1 + 0.2]]).T)  # the last two differ by rounding
    assert p == 2 / 16
    assert sign_flip_p(np.array([[0.3, -(0.1 + 0.2)]]).T) == 1.0


@pytest.mark.parametrize("n", [2, 5, 9, 14])
def test_exact_p_is_scipys(n):
    random = np.random.default_rng(n)
    d = random.normal(0.4, 1, n).round(1)  # rounded, for ties and zeros
    theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True)
    assert sign_flip_p(d[:, None])[0] == pytest.approx(theirs.pvalue, abs=1e-12)


def test_random_p_is_near_the_exact_one_and_never_zero():
    d = np.random.default_rng(0).normal(0.5, 1, 18)
    patterns = 1 - 2 * ((np.arange(2**18)[:, None] >> np.arange(18)) & 1)
    exact = np.mean(np.abs(patterns @ d) >= abs(d.sum()) - 1e-9)
    p = sign_flip_p(d[:, None])[0]
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact / 99_999))
    assert p == sign_flip_p(d[:, None])[0]  # the seed is fixed
    assert p != sign_flip_p(d[:, None], seed=1)[0]
    assert sign_flip_p(np.full((40, 1), 1.0), n_random=999)[0] == 1 / 1000  # (b + 1) / (m + 1) with b = 0
    assert smallest_p(np.array([3, 16, 17]), 999).tolist() == [0.25, 2.0**-15, 1 / 1000]


def test_one_comparison_does_not_depend_on_the_others():
    """Exact and random ones, with and without zeros, tested together as each alone; also in blocks of patterns."""
    totals = np.random.default_rng(0).normal(0.3, 1, (30, 4))
    totals[10:, 1] = 0
    totals[:5, 2] = 0
    counts = (totals != 0).astype(float)
    p, interval = sign_flip_p(totals, 999), bootstrap_interval(totals, counts, 999)
    for k in range(4):
        assert sign_flip_p(totals[:, k : k + 1], 999)[0] == p[k]
        alone = bootstrap_interval(totals[:, k : k + 1], counts[:, k : k + 1], 999)
        np.testing.assert_allclose(alone[:, 0], interval[:, k], rtol=1e-12)


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the value before it, 0.5 * 1."""
    assert holm(np.array([0.5, 0.01, NAN, 0.03, 0.02])) == pytest.approx([0.5, 0.04, NAN, 0.06, 0.06], nan_ok=True)
    assert holm(np.array([0.4, 0.6])).tolist() == [0.8, 0.8]
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []


def test_the_interval_is_the_expanded_percentile_interval_of_scipys_bootstrap():
    d = np.random.default_rng(3).exponential(1, 12)
    tail = stats.norm.cdf(math.sqrt(12 / 11) * stats.t.ppf(0.025, 11))
    level = {"confidence_level": 1 - 2 * tail, "method": "percentile", "n_resamples": 50_000, "vectorized": True}
    theirs = stats.bootstrap((d,), np.mean, rng=np.random.default_rng(0), **level).confidence_interval
    low, high = bootstrap_interval(d[:, None], np.ones((12, 1)), 50_000)[:, 0]
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (theirs.high - theirs.low))
    row = one(scores(vanilla=np.zeros(12), gated=d))
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_the_cluster_interval_draws_whole_groups():
    """Groups of 1 and 3 images with the differences 0 and 4: means of a resample are 0, 3 (both) or 4."""
    totals, counts = np.array([[0.0], [12.0]]), np.array([[1.0], [3.0]])
    assert bootstrap_interval(totals, counts)[:, 0].tolist() == [0.0, 4.0]
    groups = np.repeat(np.arange(20), 3)
    d = np.random.default_rng(0).normal(0, 1, 20)[groups]  # all images of a group agree
    table = scores(vanilla=np.zeros(60), gated=d)
    clustered, alone = one(table, groups=list(groups)), one(table)
    ratio = (clustered["high"] - clustered["low"]) / (alone["high"] - alone["low"])
    assert 1.5 < ratio < 2.1  # sqrt(3), and t with 19 instead of 59 degrees of freedom
    assert clustered["mde"] / alone["mde"] == pytest.approx(math.sqrt(3 * 59 / 57), rel=0.05)


def test_the_detectable_effect_has_80_percent_power():
    """Tables of Cohen, 1988, and of G*Power: a paired t test with n = 34 finds d = 0.5 with power .80."""
    assert detectable_effect(1 / math.sqrt(34), 34) == pytest.approx(0.5, abs=0.005)
    assert detectable_effect(2.0, 17) == pytest.approx(2 * detectable_effect(1.0, 17))
    assert detectable_effect(1.0, 100_000) == pytest.approx(stats.norm.isf(0.025) + stats.norm.isf(0.2), abs=1e-3)
    assert detectable_effect(1.0, 5) == math.inf  # five pairs give no p below .0625
    d, bound = detectable_effect(1.0, 6), stats.t.isf(1 / 64, 5)  # six give .03125
    assert stats.nct.sf(bound, 5, d) == pytest.approx(0.8)


def test_welch_and_means_are_those_of_the_summary():
    random = np.random.default_rng(0)
    table = scores(vanilla=random.normal(0, 1, 20), gated=random.normal(0.5, 2, 20))
    row, summary = one(table), summarize(table).set_index("variant")
    assert row["p_welch"] == summary["p"]["gated"]
    assert (row["mean"], row["mean_against"]) == pytest.approx((summary["mean"]["gated"], summary["mean"]["vanilla"]))
    assert row["difference"] == pytest.approx(row["mean"] - row["mean_against"])


def test_verdicts_follow_the_direction_of_the_metric():
    up = np.linspace(0.2, 0.4, 10)
    table = scores(vanilla=np.zeros(10), up=up, down=-up)
    lower = scores("pixel_flipping", vanilla=np.zeros(10), up=up, down=-up)
    own = scores("own", vanilla=np.zeros(10), up=up, down=-up)
    assert paired(table)["verdict"].tolist() == ["better", "worse"]
    assert paired(lower)["verdict"].tolist() == ["worse", "better"]
    assert paired(own)["verdict"].tolist() == ["higher", "lower"]
    assert paired(own, higher_is_better={"own": False})["verdict"].tolist() == ["worse", "better"]
    assert paired(table, against="down")["verdict"].tolist() == ["better", "better"]


def test_the_family_is_all_comparisons_or_those_of_a_metric():
    """Six images: p = 2/64 for each comparison. Holm over one leaves it, over two doubles it."""
    table = scores(vanilla=np.zeros(6), gated=np.linspace(0.1, 0.3, 6)).assign(pixel_flipping=lambda t: t["saco"])
    both = paired(table)
    assert both["p"].tolist() == [1 / 32, 1 / 32]
    assert both["p_holm"].tolist() == [1 / 16, 1 / 16]
    assert both["verdict"].tolist() == ["cannot tell", "cannot tell"]
    assert both["reason"][0] == "6 pairs give no p below 0.031, and Holm corrects for 2 comparisons"
    each = paired(table, family="metric")
    assert each["p_holm"].tolist() == [1 / 32, 1 / 32]
    assert each["verdict"].tolist() == ["better", "worse"]
    assert paired(table, metrics=["pixel_flipping"])["verdict"].tolist() == ["worse"]


def test_degenerate_comparisons_have_names():
    two = one(scores(vanilla=[0.0, NAN, 1.0], gated=[0.5, 0.1, NAN]))
    assert (two["n"], two["missing"], two["verdict"]) == (1, 2, "not tested")
    assert two["reason"] == "only one pair: a test needs at least two"
    assert two["difference"] == 0.5
    assert np.isnan([two[name] for name in ("p", "p_holm", "low", "high", "mde")]).all()
    none = one(scores(vanilla=[0.0, NAN], gated=[NAN, 1.0]))
    assert (none["n"], none["reason"], none["verdict"]) == (0, "no image has both scores", "not tested")
    assert math.isnan(none["difference"])
    same = one(scores(vanilla=[0.1, 0.7, 0.2], gated=[0.1, 0.7, 0.2]))
    assert (same["p"], same["p_holm"], same["verdict"]) == (1, 1, "no real difference")
    assert same["reason"] == "all differences are 0"
    assert np.isnan([same[name] for name in ("low", "high", "mde")]).all()
    group = one(scores(vanilla=[0.0, 0.0, 0.0], gated=[0.1, 0.2, 0.3]), groups=["a", "a", "a"])
    assert (group["groups"], group["verdict"]) == (1, "not tested")
    assert group["reason"] == "only one group: a test needs at least two"
    assert np.isnan([group[name] for name in ("p", "low", "high", "mde")]).all()
    constant = one(scores(vanilla=[0.0] * 8, gated=[0.5] * 8))
    assert (constant["p"], constant["verdict"], constant["reason"]) == (
        2 / 256,
        "better",
        "the differences do not vary",
    )
    few = one(scores(vanilla=[0.0] * 4, gated=[1.0, 2.0, 1.5, 1.2]))
    assert (few["p"], few["verdict"], few["mde"]) == (0.125, "cannot tell", math.inf)


def test_a_comparison_without_a_test_is_not_in_the_family():
    up = np.linspace(0.1, 0.3, 6)
    table = paired(scores(vanilla=np.zeros(6), gated=up, blank=[NAN] * 6)).set_index("variant")
    assert table["p_holm"]["gated"] == table["p"]["gated"] == 1 / 32
    assert table["verdict"].tolist() == ["better", "not tested"]


def test_images_are_paired_by_position_and_not_by_key_or_row():
    random = np.random.default_rng(0)
    table = scores(vanilla=random.normal(0, 1, 9), gated=random.normal(0, 1, 9))
    table["image"] = table["image"].replace("picture 1", "picture 0")
    expected = one(table)
    assert (expected["n"], expected["groups"]) == (9, 8)
    shuffled = table.sample(frac=1, random_state=0)
    assert one(shuffled).drop(["low", "high"]).to_dict() == pytest.approx(expected.drop(["low", "high"]).to_dict())
    with pytest.raises(ValueError, match="expected one row per image and variant, got two for image 'picture 0'"):
        paired(table.drop(columns="index"))
    some = table[~((table["variant"] == "gated") & table["index"].isin([2, 5]))]  # rows that are not there
    assert (one(some)["n"], one(some)["missing"]) == (7, 2)


def repeated(table, times):
    """``table`` with each image ``times`` times, each time at a place of its own."""
    n = table["index"].nunique()
    return pd.concat([table.assign(index=table["index"] + n * k) for k in range(times)], ignore_index=True)


def test_the_same_image_again_is_no_new_evidence():
    """Six images five times each: the signs of all five flip together, so p is that of six images."""
    random = np.random.default_rng(0)
    table = scores(vanilla=random.normal(0, 1, 6), gated=random.normal(0.4, 1, 6))
    first, again = one(table), one(repeated(table, 5))
    assert (again["n"], again["groups"], first["groups"]) == (30, 6, 6)
    names = ["p", "p_holm", "p_welch", "mean", "difference", "low", "high", "mde"]
    assert again[names].tolist() == pytest.approx(first[names].tolist(), rel=1e-9)
    summaries = [summarize(t)[["mean", "se", "p"]].to_numpy() for t in (table, repeated(table, 5))]
    np.testing.assert_allclose(summaries[1], summaries[0], rtol=1e-9)
    by_path = repeated(table, 5).rename(columns={"index": "path", "image": "key"})  # as the command writes it
    assert one(by_path)["p"] == again["p"]
    unnamed = repeated(table, 5).assign(image=None)  # without keys, nothing says that they are the same
    assert one(unnamed)["groups"] == 30


def test_few_different_images_have_a_reason():
    four = one(repeated(scores(vanilla=[0.0] * 4, gated=[1.0, 2.0, 1.5, 1.2]), 5))
    assert (four["p"], four["verdict"]) == (0.125, "cannot tell")
    assert four["reason"].startswith("4 different images give no p below 0.12")
    alone = one(repeated(scores(vanilla=[0.1], gated=[0.2]), 8))
    assert (alone["verdict"], alone["reason"]) == (
        "not tested",
        "only one different image: a test needs at least two",
    )


def test_groups_that_share_an_image_are_one_group():
    """Images 0 and 3 are one picture, so the groups a and b are one; c and d share only a picture without scores."""
    table = scores(vanilla=[0.0] * 6, gated=[1.0, 2.0, 4.0, 1.0, NAN, NAN]).assign(
        image=[*"pqrpzz"] * 2, group=[*"aacbcd"] * 2
    )
    row = one(table)
    assert (row["groups"], row["p"]) == (2, 2 / 4)  # totals 4 and 4
    apart = one(table.assign(image=[*"pqrszz"] * 2))
    assert apart["groups"] == 3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_differences_of_rounding_size_are_none(scale):
    base = scale * np.linspace(0.1, 1, 12)
    row = one(scores(vanilla=base, gated=base * (1 + 2e-15)))
    assert (row["verdict"], row["p"], row["reason"]) == ("no real difference", 1.0, "all differences are 0")
    assert one(scores(vanilla=base, gated=base * 1.001))["verdict"] == "better"  # small, and no rounding
    zeros = np.where(np.arange(12) % 2, base, 0.0)  # next to scores of this size, 1e-16 of it is rounding as well
    assert one(scores(vanilla=zeros, gated=zeros + 1e-16 * scale))["p"] == 1.0
    low = scores(vanilla=base, gated=base * (1 + 1e-7)).astype({"saco": np.float32})
    assert one(low)["verdict"] == "no real difference"


def test_an_image_with_huge_scores_does_not_hide_the_others():
    base = np.array([1e12, *np.linspace(0.1, 1, 11)])
    assert one(scores(vanilla=base, gated=base * 1.01))["verdict"] == "better"


def test_a_metric_that_depends_on_the_scale_is_not_tested():
    table = scores("infidelity", vanilla=np.linspace(2, 3, 10), gated=np.linspace(1, 1.5, 10))
    row = one(table.assign(saco=table["infidelity"]), metrics=["infidelity"])
    assert (row["verdict"], row["reason"]) == (
        "not tested",
        "the score depends on the scale of the map, and each variant has its own",
    )
    assert np.isnan(row[["p", "p_holm", "low", "high", "mde", "p_welch"]].tolist()).all()
    assert (row["mean"], row["mean_against"]) == (1.25, 2.5)
    both = paired(table.assign(saco=table["infidelity"])).set_index("metric")
    assert both["p_holm"]["saco"] == both["p"]["saco"]  # a comparison without a test is not in the family
    assert set(summarize(table)["stars"]) == {""}


def test_groups_by_column_and_by_sequence_are_the_same():
    random = np.random.default_rng(0)
    names = np.array(list("abcab" * 4))
    table = scores(vanilla=random.normal(0, 1, 20), gated=random.normal(1, 1, 20))
    column = table.assign(group=np.tile(names, 2), patient=np.tile(names, 2))
    expected = one(table, groups=list(names))
    for name in ("group", "patient"):
        found = one(column.drop(columns={"group": "patient", "patient": "group"}[name]), groups=name)
        assert found.to_dict() == expected.to_dict()
    assert expected["groups"] == 3
    assert set(summarize(table.assign(group="a"))["metric"]) == {"saco"}


@pytest.mark.parametrize("empty", ["", None, np.nan, pd.NA])
@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_an_image_with_an_empty_group_is_a_group_by_itself(empty, dtype):
    table = scores(vanilla=[0.1, 0.2, 0.3, 0.5], gated=[0.2, 0.4, 0.1, 0.7])
    for names, groups in (([empty] * 4, 4), (["a", empty, "a", empty], 3), (["a", empty, "b", "b"], 3)):
        column = table.assign(group=pd.Series(names * 2, dtype=object).astype(dtype))
        assert one(column)["groups"] == groups
        assert one(column, groups="group")["groups"] == groups
    numbers = table.assign(group=pd.array([1, None, 1, None] * 2, "Int64"))
    assert one(numbers)["groups"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "plain"}, r"against: expected one of \['vanilla', 'gated'\], got 'plain'"),
        ({"metrics": ["sacco"]}, r"metrics: expected some of \['saco'\], got 'sacco'"),
        ({"family": "each"}, "family: expected 'all' or 'metric', got 'each'"),
        ({"groups": "patient"}, "groups: expected a column of scores, .* got 'patient'"),
        ({"groups": ["a"]}, "groups: expected 3 entries, one per image, got 1"),
        ({"groups": ["a", None, "b"]}, "groups: expected a group for each image, got none for 1"),
        ({"groups": ["a", "", "b"]}, "groups: expected a group for each image, got none for 1"),
        ({"groups": "image"}, None),
        ({"groups": "group"}, "groups: expected one group per image, got several for 2"),
        ({"n_resamples": 0}, "n_resamples: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    table = scores(vanilla=[0.1, 0.2, 0.3], gated=[0.2, 0.4, 0.1])
    table["group"] = [0, 0, 0, 0, 0, 1]
    if message is None:
        assert paired(table, **options)["groups"].tolist() == [3]
        return
    with pytest.raises(ValueError, match=message):
        paired(table, **options)


def test_wrong_tables_are_named():
    table = scores(vanilla=[0.1, 0.2], gated=[0.2, math.inf])
    with pytest.raises(ValueError, match="expected finite numbers or NaN in the column 'saco', got an infinite one"):
        paired(table)
    with pytest.raises(ValueError, match="expected numbers in the column 'patient'"):
        paired(table.assign(patient="a"))
    with pytest.raises(ValueError, match="expected one of the columns"):
        paired(table.drop(columns=["index", "image"]))


def test_one_variant_gives_an_empty_table():
    table = paired(scores(vanilla=[0.1, 0.2]))
    assert len(table) == 0
    assert list(table.columns) == list(paired(scores(vanilla=[0.1, 0.2], gated=[0.2, 0.3])).columns)


def test_the_table_is_left_as_found():
    table = scores(vanilla=[0.1, 0.2, 0.4], gated=[0.2, 0.4, 0.1])
    before = table.copy()
    paired(table, groups=["a", "b", "a"])
    pd.testing.assert_frame_equal(table, before)


def test_the_rank_by_hand():
    """Means over images 0 and 1, which all variants have: real 0.4; shuffled 0.3, 0.4 (a tie counts) and 0.5."""
    table = scores(real=[0.3, 0.5, 9.0], a=[0.2, 0.4, 9.0], b=[0.4, 0.4, 0.0], c=[0.5, 0.5, NAN])
    row = rank_test(table, "real", ["a", "b", "c"]).iloc[0]
    assert (row["rank"], row["p"], row["n_shuffled"], row["n_images"], row["missing"]) == (3, 3 / 4, 3, 2, 1)
    assert (row["mean"], row["best_shuffled"]) == (0.4, 0.5)
    lower = rank_test(table.rename(columns={"saco": "pixel_flipping"}), "real", ["a", "b", "c"]).iloc[0]
    assert (lower["rank"], lower["p"], lower["best_shuffled"]) == (3, 3 / 4, pytest.approx(0.3))


def test_equal_means_around_zero_are_ties_whatever_their_rounding():
    """The same values in another order: their means differ by rounding, which is large beside a mean of 0."""
    values = np.random.default_rng(3).normal(size=40)
    values -= values.mean()
    orders = {f"shuffled {seed}": np.random.default_rng(seed).permutation(values).tolist() for seed in range(19)}
    assert rank_test(scores(real=values.tolist(), **orders), "real", list(orders))["p"].tolist() == [1.0]


def test_means_that_differ_by_rounding_are_tied():
    table = scores(real=[1.0, -1.0], a=[1.0, -1.0 - 3e-16], b=[1.0, -1.5])
    row = rank_test(table, "real", ["a", "b"]).iloc[0]
    assert (row["mean"], row["rank"]) == (0.0, 2)  # its size is not that of the scores


def test_pandas_own_types_have_their_rounding():
    table = scores(vanilla=np.linspace(0.1, 1, 12), gated=np.linspace(0.1, 1, 12) * (1 + 1e-7))
    verdicts = [one(table.astype({"saco": kind}))["verdict"] for kind in ("Float32", "Float64")]
    assert verdicts == ["no real difference", "better"]


def test_nineteen_seeds_give_a_p_of_5_percent():
    names = {f"shuffled {seed}": [0.1 * seed / 19, 0.2] for seed in range(19)}
    assert rank_test(scores(real=[0.9, 0.9], **names), "real", list(names))["p"].tolist() == [0.05]
    blank = rank_test(scores(real=[NAN, NAN], **names), "real", list(names)).iloc[0]
    assert blank["reason"] == "no image has a score for all of these variants"
    assert math.isnan(blank["p"])


@pytest.mark.parametrize(
    ("variant", "shuffled", "message"),
    [
        ("reel", ["a"], "variant: expected one of .* got 'reel'"),
        ("real", ["z"], "shuffled: expected one of .* got 'z'"),
        ("real", [], "shuffled: expected the names of at least one variant"),
        ("real", "a", "shuffled: expected the names of at least one variant"),
        ("real", ["a", "a"], "shuffled: expected different variants"),
        ("real", ["real"], "shuffled: expected different variants"),
    ],
)
def test_wrong_ranks_are_named(variant, shuffled, message):
    with pytest.raises(ValueError, match=message):
        rank_test(scores(real=[0.1], a=[0.2]), variant, shuffled)
    with pytest.raises(ValueError, match="higher_is_better: expected an entry for 'own', got none"):
        rank_test(scores("own", real=[0.1], a=[0.2]), "real", ["a"])


def grouped():
    """Scores of 8 images of 2 patients, and their groups."""
    rows = [
        {"index": i, "image": f"k{i}", "group": i % 2, "variant": variant, "saco": (variant == "b") + i / 100}
        for i in range(8)
        for variant in ("vanilla", "b")
    ]
    return pd.DataFrame(rows), [i % 2 for i in range(8)]


def test_groups_of_every_form():
    table, groups = grouped()
    plain = table.drop(columns="group")
    for given in (groups, np.array(groups), torch.tensor(groups)):
        assert paired(plain, groups=given)["groups"].tolist() == [2]
    assert paired(plain)["groups"].tolist() == [8]
    for given in (dict.fromkeys(range(8), 0), pd.Series(groups)):
        with pytest.raises(TypeError, match="groups: expected a list, an array or a tensor, one entry per image"):
            paired(plain, groups=given)


def test_the_groups_of_compare_are_used():
    assert paired(grouped()[0])["groups"].tolist() == [2]


def test_tables_of_different_images_are_no_pairs():
    table, _ = grouped()
    table.loc[table["variant"] == "b", "image"] += "x"
    with pytest.raises(ValueError, match="scores: expected one image per index, got several for index 0"):
        paired(table)


def with_targets(targets, variants=("vanilla", "gated")):
    """Two images under some variants, whose targets are given in rows."""
    return scores(**{name: [0.1, 0.2] for name in variants}).assign(target=targets)


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        ([3, 4, 3, 5], "got 4 in 'vanilla' and 5 in 'gated' for index 1"),
        ([3.0, None, 3.0, 5.0], "got none in 'vanilla' and 5 in 'gated' for index 1"),
        (["cat", "dog", "dog", "dog"], "got cat in 'vanilla' and dog in 'gated' for index 0"),
    ],
)
def test_variants_that_explain_different_classes_are_not_compared(targets, got):
    table, message = with_targets(targets), f"scores: expected the same target in all variants of an image, {got}"
    for compare in (paired, summarize, lambda given: rank_test(given, "vanilla", ["gated"])):
        with pytest.raises(ValueError, match=message):
            compare(table)
    with pytest.raises(ValueError, match="for image 'picture"):
        paired(table.drop(columns="index"))


def test_classes_may_differ_between_images_and_be_unknown():
    for targets in ([3, 4, 3, 4], [None] * 4, [None, 1, None, 1]):
        table = with_targets(targets)
        assert paired(table)["n"].tolist() == [2]
        assert summarize(table)["n"].tolist() == [2, 2]
    twice = scores(vanilla=[0.1, 0.2], gated=[0.1, 0.2]).assign(image="a", target=[3, 4, 3, 4]).drop(columns="index")
    assert summarize(twice)["n"].tolist() == [2, 2]  # the same picture under two classes, in both variants
