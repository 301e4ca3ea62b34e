"""The report as one HTML file. It contains the figure, and every text in it is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastfg.report.table import FOOTNOTE, table_cells

if TYPE_CHECKING:
    import pandas as pd


def write_page(
    path: Path,
    *,
    title: str,
    subtitle: str,
    summary: pd.DataFrame,
    scores: pd.DataFrame,
    errors: pd.DataFrame,
    figure: Path,
    figure_caption: str,
    settings: Mapping[str, object],
    notes: Sequence[str] = (),
    against: str = "vanilla",
) -> None:
    """Write the report to ``path``. The page needs no other file, no script and no network.

    Args:
        title, subtitle: the heading, and the line under it.
        summary: from :func:`fastfg.study.summarize`.
        scores, errors: from :func:`fastfg.study.compare_batch`.
        figure: a PNG file, which is embedded. figure_caption: its caption.
        settings: {name: value}, shown as text.
        notes: paragraphs under the comparison.
        against: the variant that the others are tested against.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("fastfg.report", "."), autoescape=True, undefined=StrictUndefined)
    columns, rows = table_cells(summary)
    page = environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        columns=columns,
        rows=rows,
        footnote=FOOTNOTE.format(against=against),
        notes=notes,
        figure=base64.b64encode(figure.read_bytes()).decode(),
        figure_caption=figure_caption,
        settings=settings,
        score_columns=list(scores.columns),
        scores=[[_shown(value) for value in row] for row in scores.itertuples(index=False)],
        errors=[list(row) for row in errors.itertuples(index=False)],
    )
    path.write_text(page, encoding="utf-8")


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
