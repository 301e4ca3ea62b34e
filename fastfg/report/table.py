"""The comparison as a table: one row per variant, one column per metric, the best mean per column in bold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from fastfg.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

FOOTNOTE = (
    "Mean ± standard error over images. Stars: Welch's t-test (two-sided) against {against}, * p < .05, ** p < .01, "
    "*** p < .001. Bold: the best mean of its column."
)
MARKUP = re.compile(r"[\\`*<&|\[\]~]|(?<![^\W_])_|_(?![^\W_])")  # of Markdown; an underscore within a word is text


class Cell(NamedTuple):
    """One table cell: its text, and whether it is the best of its column."""

    text: str
    best: bool


def table_cells(summary: pd.DataFrame) -> tuple[list[str], dict[str, list[Cell]]]:
    """Column titles and {variant: cells}, from a table of :func:`fastfg.study.summarize`."""
    metrics = list(dict.fromkeys(summary["metric"]))
    best = {}
    for metric in metrics:
        means = summary.loc[summary["metric"] == metric].set_index("variant")["mean"].dropna()
        if len(means) and metric in METRICS:  # for a user's own metric, the better direction is unknown
            best[metric] = means.idxmax() if METRICS[metric].higher_is_better else means.idxmin()
    rows: dict[str, list[Cell]] = {}
    for entry in summary.sort_values("metric", key=lambda m: m.map(metrics.index), kind="stable").to_dict("records"):
        text = f"{entry['mean']:.3f} ± {entry['se']:.3f}{entry['stars']}"
        if entry["missing"]:  # a mean over some of the images says so
            text += f" ({entry['missing']} of {entry['missing'] + entry['n']} missing)"
        rows.setdefault(entry["variant"], []).append(Cell(text, best.get(entry["metric"]) == entry["variant"]))
    return [_title(metric) for metric in metrics], rows


def markdown_table(summary: pd.DataFrame, against: str = "vanilla") -> str:
    """``summary`` as a Markdown table. Its footnote names ``against``, the variant that the tests compare with.

    Markup in the names of variants and metrics is escaped, and their line breaks become spaces.
    """
    titles, rows = table_cells(summary)
    lines = ["| | " + " | ".join(map(_escape, titles)) + " |", "| --- |" + " ---: |" * len(titles)]
    for variant, cells in rows.items():
        shown = [f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text) for cell in cells]
        lines.append(f"| {_escape(variant)} | " + " | ".join(shown) + " |")
    footnote = FOOTNOTE.replace("*", "\\*").format(against=_escape(against))
    return "\n".join(lines) + "\n\n" + footnote + "\n"


def _title(metric: str) -> str:
    if metric not in METRICS:
        return metric
    return f"{METRICS[metric].title} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def _escape(text: str) -> str:
    """``text`` on one line, as Markdown that shows it unchanged."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
