"""Write the report as one HTML file. It contains the figure, and all text in it is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.report.table import (
    DIFFERENCE_TITLES,
    FOOTNOTE,
    compared_with,
    difference_cells,
    differences,
    differences_note,
    table_cells,
)

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
    against: str | None = None,
    paired: pd.DataFrame | None = None,
) -> None:
    """Write the report to ``path``. The page needs no other file, no script and no network.

    Args:
        title, subtitle: the heading, and the line under it.
        summary: a result of :func:`fastfg.study.summarize`.
        scores, errors: tables from :func:`fastfg.study.compare_batch`.
        figure: a PNG file, which is embedded. figure_caption: its caption.
        settings: {name: value}, shown as text.
        notes: paragraphs under the comparison.
        against: the variant that the others are tested against; None: the one that the tables name.
        paired: a result of :func:`fastfg.study.paired`; without it, the page does not say which differences are real.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    against = compared_with(against, summary, paired)
    environment = Environment(loader=PackageLoader("fastfg.report", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        means=table_cells(summary, paired),
        sentences=[] if paired is None else differences(paired, against),
        differences={} if paired is None else difference_cells(paired),
        difference_titles=DIFFERENCE_TITLES,
        differences_note="" if paired is None else differences_note(paired, against),
        footnote=FOOTNOTE.format(against=against),
        notes=notes,
        figure=base64.b64encode(figure.read_bytes()).decode(),
        figure_caption=figure_caption,
        settings=settings,
        scores=_records(scores),
        errors=_records(errors),
    )
    path.write_text(page, encoding="utf-8")


def _records(table: pd.DataFrame) -> dict[str, Any]:
    """The columns and rows of ``table`` as the page shows them, and which columns hold text."""
    from pandas.api.types import is_numeric_dtype

    return {
        "columns": list(table.columns),
        "texts": [name for name in table.columns if not is_numeric_dtype(table[name])],
        "rows": [{name: _shown(value) for name, value in row.items()} for row in table.to_dict("records")],
    }


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
