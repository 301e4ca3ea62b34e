"""One HTML file that holds the whole report: the figure inside it, every name escaped."""

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
    """Write the report to ``path``; it needs no other file and no network.

    Args:
        summary: from :func:`fastfg.study.summarize`. scores, errors: from :func:`fastfg.study.compare_batch`.
        figure: a PNG, which is put into the page. settings: name and value, shown as they are.
        notes: paragraphs under the table.
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
