"""The comparison as tables and sentences. A mean is bold only if it is the best, and better than ``against``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfg.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

FOOTNOTE = (
    "Mean ± standard error over images. Bold: the best mean of its column, where the paired test finds it better than "
    "{against} (Holm p < .05); none where variants lack scores of different images, and never one of fewer images "
    "(n = ...). Stars, for comparison with the paper: Welch's t-test (two-sided) against {against}, * p < .05, "
    "** p < .01, *** p < .001."
)
DIFFERENCES_NOTE = (
    "Difference to {against} on the same images, with its 95% bootstrap interval. Holm p: sign-flip test, corrected"
    "{family}. Welch p: unpaired, uncorrected. MDE: the minimum detectable effect of one comparison (80% "
    "power); a smaller one is often missed."
)
FAMILIES = {
    "all": " for all {n} comparisons with {against}",
    "metric": " for the comparisons of one metric with {against}",
}
DIFFERENCE_TITLES = ("", "difference", "Holm p", "Welch p", "MDE", "n", "verdict")
DIRECTIONS = ("better", "worse", "higher", "lower")
PER_TABLE = 3  # metrics side by side: fits a terminal of 100 columns
MARKUP = re.compile(r"[\\`*<&|\[\]~]|(?<![^\W_])_|_(?![^\W_])")  # of Markdown; an underscore within a word is text


class Cell(NamedTuple):
    """One table cell: its text, and whether it is the best of its column by the paired test."""

    text: str
    best: bool


class Means(NamedTuple):
    """A table of means: the titles of its metrics, and {variant: cells}."""

    titles: list[str]
    rows: dict[str, list[Cell]]


def table_cells(
    summary: pd.DataFrame,
    paired: pd.DataFrame | None = None,
    *,
    per_table: int = PER_TABLE,
    heading: Callable[[str], str] | None = None,
) -> list[Means]:
    """The means of at most ``per_table`` metrics per table.

    Args:
        summary: a table of :func:`fastfg.study.summarize`.
        paired: the table of :func:`fastfg.study.paired` for the same scores. Without it, no cell is the best.
        heading: metric -> the title of its column; None: the metric's own title, with an arrow.
    """
    titled = heading or (lambda metric: _title(metric, paired))
    metrics = list(dict.fromkeys(summary["metric"]))
    columns = {}
    for metric in metrics:
        found = summary.loc[summary["metric"] == metric]
        show, best = _shown(found["mean"]), _best(found, paired, metric)
        most = int((found["n"] + found["missing"]).max())
        columns[metric] = {
            e["variant"]: Cell(_mean(e, show, most), e["variant"] == best) for e in found.to_dict("records")
        }
    variants = list(dict.fromkeys(summary["variant"]))
    return [
        Means([titled(m) for m in part], {v: [columns[m][v] for m in part] for v in variants})
        for part in (metrics[first : first + per_table] for first in range(0, len(metrics), per_table))
    ]


def difference_cells(paired: pd.DataFrame, heading: Callable[[str], str] | None = None) -> dict[str, list[list[str]]]:
    """{title of a metric: one row per variant, with the cells of ``DIFFERENCE_TITLES``}; ``heading`` as above."""
    titled = heading or (lambda metric: _title(metric, paired))
    tables: dict[str, list[list[str]]] = {}
    for metric, rows in paired.groupby("metric", sort=False):
        show = _shown(rows["difference"])
        tables[titled(str(metric))] = [
            [r["variant"], _interval(r, show), _p(r["p_holm"]), _p(r["p_welch"]), show(r["mde"]), _n(r), r["verdict"]]
            for r in rows.to_dict("records")
        ]
    return tables


def compared_with(against: str | None, *tables: pd.DataFrame | None) -> str:
    """The variant that ``tables`` of :func:`fastfg.study.summarize` and ``paired`` compare with.

    They hold it in ``attrs["against"]``. If that was lost on the way through a file, it is ``against``, else
    ``vanilla``. Raises ValueError if the tables or ``against`` name different variants.
    """
    given = [table for table in tables if table is not None]
    named = list(dict.fromkeys([table.attrs["against"] for table in given if "against" in table.attrs]))
    if len(named) > 1:
        raise ValueError(f"paired: expected the same variant to compare with as in summary, got {named}")
    found = named[0] if named else against or "vanilla"
    for table in given:
        if "verdict" in table and found in set(table["variant"]):
            raise ValueError(f"against: expected the variant that paired compares with, got {found!r}, one of its rows")
    if against not in (None, found):
        raise ValueError(f"against: expected {found!r}, which the statistics compare with, got {against!r}")
    return found


def differences_note(paired: pd.DataFrame, against: str) -> str:
    """What the tables of differences show; the family is named if ``paired`` still holds it."""
    family = FAMILIES.get(paired.attrs.get("family", ""), "").format(n=paired["p"].notna().sum(), against=against)
    return DIFFERENCES_NOTE.format(against=against, family=family)


def differences(paired: pd.DataFrame, against: str | None = None) -> list[str]:
    """Which differences are real, in plain words, from :func:`fastfg.study.paired`: one text per metric.

    Metrics of which the same is said share one text. ``against`` is as in :func:`markdown_table`.
    """
    against = compared_with(against, paired)
    titles: dict[str, list[str]] = {}
    for metric, rows in paired.groupby("metric", sort=False):
        title = METRICS[str(metric)].title if metric in METRICS else str(metric)
        titles.setdefault(_sentences(rows, against), []).append(title)
    return [f"{', '.join(named)}. {text}" for text, named in titles.items()]


def markdown_table(summary: pd.DataFrame, against: str | None = None, paired: pd.DataFrame | None = None) -> str:
    """The means as Markdown tables, and with ``paired`` also the differences, in words and as tables.

    ``against`` is the variant that the tests compare with; None: the one that the tables name. Markup in the names of
    variants and metrics is escaped, and their line breaks become spaces. Raises ValueError if ``against``, ``summary``
    and ``paired`` do not name the same variant.
    """
    against, parts = compared_with(against, summary, paired), []
    for titles, rows in table_cells(summary, paired):
        cells = [
            [variant, *(f"**{_escape(c.text)}**" if c.best else _escape(c.text) for c in row)]
            for variant, row in rows.items()
        ]
        parts.append(_markdown(["", *titles], [[_escape(row[0]), *row[1:]] for row in cells]))
    parts.append(_escape(FOOTNOTE.format(against=against)))
    if paired is not None and len(paired):
        parts.append("## Which differences are real")
        parts.append("\n".join(f"- {_escape(text)}" for text in differences(paired, against)))
        for title, lines in difference_cells(paired).items():
            parts += [f"### {_escape(title)}", _markdown(DIFFERENCE_TITLES, [list(map(_escape, x)) for x in lines])]
        parts.append(_escape(differences_note(paired, against)))
    return "\n\n".join(parts) + "\n"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_escape, titles)) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _best(found: pd.DataFrame, paired: pd.DataFrame | None, metric: str) -> str | None:
    """The variant with the best mean of ``metric`` if it is better than the one compared with, else None."""
    found = found[found["n"] > 0]
    if paired is None or not len(found):
        return None
    judged = found["n"] + found["missing"]
    found = found[judged == judged.max()]  # others were judged on a part of the images
    own = paired.loc[(paired["metric"] == metric) & paired["variant"].isin(found["variant"])]
    if len({*found["missing"], *own["missing"]}) > 1:  # means over different images do not compare
        return None
    means = found.set_index("variant")["mean"]
    real = own.loc[own["verdict"] == "better"].set_index("variant")["difference"]
    if not len(means) or not len(real):
        return None
    best = str(means.idxmax() if real.iloc[0] > 0 else means.idxmin())  # the verdict knows the direction
    return best if best in real.index else None


def _mean(entry: dict[Any, Any], show: Callable[[float], str], most: int) -> str:
    """A mean over some of the images says so. ``most``: the number of images of the variant that has most."""
    if not entry["n"]:
        return "no score"
    text = f"{show(entry['mean'])} ± {show(entry['se'])}{entry['stars']}"
    if entry["missing"]:
        return f"{text} ({entry['missing']} of {entry['missing'] + entry['n']} missing)"
    return text if entry["n"] == most else f"{text} (n = {entry['n']})"


def _sentences(rows: pd.DataFrame, against: str) -> str:
    """For one metric: ``Better than vanilla: gated (0.200 [0.100, 0.300], Holm p = .001, n = 12). No real ...``."""
    show, said = _shown(rows["difference"]), []
    for verdict in dict.fromkeys(map(str, rows["verdict"])):
        names: dict[str, list[str]] = {}  # the variants by what is said of them
        for r in rows.loc[rows["verdict"] == verdict].to_dict("records"):
            if verdict in DIRECTIONS:
                n = in_groups(str(r["n"]), r["n"], r["groups"])
                detail = f"{_interval(r, show)}, Holm p {equals(r['p_holm'])}, n = {n}"
            else:
                detail = r["reason"] or f"an effect below {show(r['mde'])} is often missed"
            names.setdefault(detail, []).append(r["variant"])
        described = [f"{', '.join(variants)} ({detail})" for detail, variants in names.items()]
        title = f"{verdict} than {against}" if verdict in DIRECTIONS else verdict
        said.append(f"{title[0].upper()}{title[1:]}: {'; '.join(described)}.")
    return " ".join(said)


def _interval(row: dict[Any, Any], show: Callable[[float], str]) -> str:
    text = show(row["difference"])
    return text if row["low"] != row["low"] else f"{text} [{show(row['low'])}, {show(row['high'])}]"


def _n(row: dict[Any, Any]) -> str:
    text = in_groups(str(row["n"]), row["n"], row["groups"])
    return f"{text} ({row['missing']} missing)" if row["missing"] else text


def in_groups(text: str, n: int, groups: int | None) -> str:
    """``text`` on ``n`` images, with the number of their groups where it is another one.

    >>> in_groups("30", 30, 8), in_groups("30 images", 30, 30), in_groups("30", 30, None)
    ('30 in 8 groups', '30 images', '30')
    """
    return text if groups in (None, n) else f"{text} in {groups} group{'s' * (groups != 1)}"


def of_all(n: int, missing: int = 0, groups: int | None = None) -> str:
    """A number of images, with that of all images if some are missing, and that of their groups.

    >>> of_all(12), of_all(12, 48), of_all(12, 48, 3)
    ('12', '12 of 60', '12 of 60 in 3 groups')
    """
    return in_groups(f"{n} of {n + missing}" if missing else str(n), n, groups)


def _p(p: float) -> str:
    if p != p:
        return ""
    shown = f"{p:.3f}".lstrip("0")
    return "< .001" if p < 0.001 else "< .05" if p < 0.05 and shown == ".050" else shown


def equals(p: float) -> str:
    """``= .013``, or ``< .001``.

    >>> equals(0.013), equals(0.0002), equals(0.0499), equals(0.05)
    ('= .013', '< .001', '< .05', '= .050')
    """
    return _p(p) if _p(p).startswith("<") else f"= {_p(p)}"


def signed(value: float) -> str:
    """A difference with its sign: four decimals, or three digits if it is very small or large.

    >>> signed(0.0213), signed(-2e-6), signed(-0.0)
    ('+0.0213', '-2.00e-06', '+0.0000')
    """
    value += 0.0  # -0.0 becomes 0.0
    return f"{value:+.4f}" if 0.001 <= abs(value) < 10_000 or not value else f"{value:+.2e}"


def _shown(values: pd.Series) -> Callable[[float], str]:
    """How the numbers of one metric are shown: three decimals, or three digits if they are very small or large."""
    largest = values.abs().max()
    fixed = not largest > 0 or 0.01 <= largest < 10_000
    return lambda value: "" if value != value else f"{value:.3f}" if fixed else f"{value:.2e}"


def _title(metric: str, paired: pd.DataFrame | None) -> str:
    """The title with an arrow, by the directions that ``paired`` was given, else by the metric's own."""
    own = {} if paired is None else paired.attrs.get("higher_is_better", {})
    title = METRICS[metric].title if metric in METRICS else metric
    if metric not in METRICS and metric not in own:
        return title
    return f"{title} {'↑' if own.get(metric, metric in METRICS and METRICS[metric].higher_is_better) else '↓'}"


def _escape(text: str) -> str:
    """``text`` on one line, as Markdown that shows it unchanged."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
