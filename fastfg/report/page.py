"""Write the report: one HTML file that needs no other file and no network, and its figures and tables beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfg.files import write_durably
from fastfg.report.charts import (
    Chart,
    ablation_charts,
    combination_charts,
    curve_charts,
    difference_charts,
    layer_charts,
    shuffled_charts,
    sweep_charts,
)
from fastfg.report.contents import Contents, Effect, file_of
from fastfg.report.embedded import gallery
from fastfg.report.figure import save_figure
from fastfg.report.names import GROUPS, Names
from fastfg.report.table import (
    DIFFERENCE_TITLES,
    FOOTNOTE,
    compared_with,
    difference_cells,
    differences_note,
    equals,
    of_all,
    signed,
    table_cells,
)
from fastfg.report.theme import LIGHT, darkened, render

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).parent
FIGURES, TABLES, PAGE = "figures", "tables", "report.html"
CHARTS = {
    "difference": ("Differences", difference_charts),
    "layers": ("Layer by layer", layer_charts),
    "combinations": ("Sets of layers", combination_charts),
    "sweep": ("Sharpness and strength", sweep_charts),
    "curves": ("Removing patches", curve_charts),
    "shuffled": ("Shuffled decoders", shuffled_charts),
    "ablation": ("Taking features out", ablation_charts),
}
MOST_ROWS = 1000  # of the table of scores in the page; the folder has all
PLAIN = re.compile(r"[^\w.+-]+")


class Cell(NamedTuple):
    """One cell of a table in the page. ``text`` is what it says; ``number`` aligns it right; ``best`` is bold."""

    text: str
    number: bool = False
    best: bool = False


class Table(NamedTuple):
    """A table of the page: its caption, its columns, and groups of rows (a heading or nothing, and the rows)."""

    caption: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]

    @property
    def numbers(self) -> list[bool]:
        """Whether each column has numbers, by its first row."""
        first = next((rows[0] for _, rows in self.groups if rows), ())
        return [cell.number for cell in first] or [False] * len(self.columns)


class Picture(NamedTuple):
    """A chart of the page, as SVG in base64."""

    chart: Chart
    light: str
    dark: str
    table: Table


def write_report(folder: str | Path, contents: Contents) -> Path:
    """Write ``report.html`` to ``folder``, and return its path.

    The page has no links to other files. Beside it are ``figures/`` (each chart as PNG and SVG) and ``tables/`` (each
    table as CSV and Parquet). Files of an earlier report with the same names are replaced.

    Args:
        folder: it is created if it is not there.
        contents: what the report is made of.

    Raises ValueError where the parts do not fit together.
    """
    folder, names = Path(folder), Names(contents)
    folder.mkdir(parents=True, exist_ok=True)
    charts = {part: list(make(names)) for part, (_, make) in CHARTS.items()}
    _write_tables(folder / TABLES, contents)
    (folder / FIGURES).mkdir(exist_ok=True)
    if contents.images and names.pair is not None:
        save_figure(folder / FIGURES / "images.png", contents)
    pictures = {part: [_picture(chart, folder / FIGURES) for chart in found] for part, found in charts.items()}
    page = folder / PAGE
    write_durably(page, _html(names, pictures).encode())
    return page


def _html(names: Names, pictures: Mapping[str, Sequence[Picture]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    contents = names.contents
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    data = json.dumps(gallery(names), separators=(",", ":")) if contents.images else ""
    for mark, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):  # data can't end its element
        data = data.replace(mark, code)
    return environment.get_template("page.html.jinja").render(
        contents=contents,
        claims=[(claim, [_effect(effect, names) for effect in claim.effects]) for claim in contents.claims],
        means=_means(names),
        paired=_paired(names),
        about=[one for one in names.variants.values() if one.about],
        parts={part: (CHARTS[part][0], found) for part, found in pictures.items()},
        ranks=None if contents.ranks is None else frame(contents.ranks, "The real decoder's rank"),
        scores=_scores(names),
        errors=None if contents.errors is None or not len(contents.errors) else frame(_errors(contents), "Errors"),
        settings={name: _plain(value) for name, value in contents.settings.items()},
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(data),
        pair=names.pair,
    )


# Tables --------------------------------------------------------------------------------------------------------------


def frame(table: pd.DataFrame, caption: str) -> Table:
    """A pandas table as a table of the page."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    numbers = [is_numeric_dtype(table[name]) and not is_bool_dtype(table[name]) for name in table.columns]
    rows = [
        [Cell(shown(value), number) for value, number in zip(row, numbers, strict=True)]
        for row in table.itertuples(index=False, name=None)
    ]
    return Table(caption, [str(name).replace("_", " ") for name in table.columns], [("", rows)])


def shown(value: object) -> str:
    """A value of a table as the page shows it: floats with four digits, nothing for a missing value."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool) or type(value).__name__ == "bool":
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else shown(value)


def _effect(effect: Effect, names: Names) -> dict[str, str]:
    """One effect in words."""
    interval = "" if effect.low != effect.low else f" [{signed(effect.low)}, {signed(effect.high)}]"
    p = "not tested" if effect.p != effect.p else f"p {equals(effect.p)}"
    return {
        "metric": names.heading(effect.metric),
        "variant": effect.variant,
        "pair": f"{effect.variant} minus {effect.against}",
        "difference": "missing" if effect.difference != effect.difference else f"{signed(effect.difference)}{interval}",
        "p": p,
        "n": of_all(effect.n, effect.missing, effect.groups),
        "verdict": effect.verdict,
    }


def _means(names: Names) -> dict[str, Any] | None:
    """Table 1: means of all metrics by variant, in groups by role. Seeds are one row, with the range of their means."""
    contents = names.contents
    if contents.summary is None:
        return None
    paired = next(iter(contents.paired.values()), None)
    against = compared_with(next(iter(contents.paired), None), contents.summary, paired)
    summary = contents.summary.loc[contents.summary["metric"].isin(names.metrics)]
    summary = summary.assign(metric=summary["metric"].astype("category").cat.set_categories(names.metrics))
    summary = summary.sort_values("metric", kind="stable").astype({"metric": object})
    (cells,) = table_cells(summary, paired, per_table=len(names.metrics), heading=names.heading)
    groups: dict[str, list[list[Cell]]] = {}
    for name, variant in names.variants.items():
        if name in cells.rows and variant.role != "seed":
            row = [Cell(_unbroken(cell.text), True, cell.best) for cell in cells.rows[name]]
            groups.setdefault(GROUPS[variant.role], []).append([Cell(name), *row])
    if seeds := [name for name in names.of_role("seed") if name in cells.rows]:
        groups.setdefault("Controls", []).append(_seeds(summary, seeds, names.metrics))
    caption = "Mean ± standard error over images"
    table = Table(caption, ["variant", *cells.titles], list(groups.items()))
    every = [[Cell(name), *(Cell(_unbroken(c.text), True, c.best) for c in cells.rows[name])] for name in seeds]
    more = Table("Each shuffled decoder", ["variant", *cells.titles], [("", every)]) if seeds else None
    return {"table": table, "note": FOOTNOTE.format(against=against), "seeds": more}


def _unbroken(text: str) -> str:
    """A mean whose line may break before what stands in parentheses alone."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}(", " (")


def _seeds(summary: pd.DataFrame, seeds: Sequence[str], metrics: Sequence[str]) -> list[Cell]:
    """One row for variants that differ by a seed alone: the mean of their means, and the range of these."""
    means = summary.loc[summary["variant"].isin(seeds)].groupby("metric")["mean"]
    texts = [f"{means.mean()[m]:.3f} ({means.min()[m]:.3f} to {means.max()[m]:.3f})" for m in metrics]
    return [Cell(f"{len(seeds)} shuffled decoders: mean (range)"), *(Cell(text, True) for text in texts)]


def _paired(names: Names) -> list[dict[str, Any]]:
    """The paired differences, one table per metric and variant compared with."""
    found = []
    for against, table in names.contents.paired.items():
        compared_with(against, table)
        for title, rows in difference_cells(table, names.heading).items():
            last = len(DIFFERENCE_TITLES) - 1
            cells = [[Cell(text, 0 < i < last) for i, text in enumerate(row)] for row in rows]
            columns = ["variant", *DIFFERENCE_TITLES[1:]]
            note = differences_note(table, against)
            found.append({"table": Table(f"{title}: difference to {against}", columns, [("", cells)]), "note": note})
    return found


def _scores(names: Names) -> Table | None:
    """The scores of each image, where no gallery shows them and they are few enough."""
    contents = names.contents
    if contents.images or len(contents.scores) > MOST_ROWS:
        return None
    return frame(contents.scores, "Scores of each image")


def _errors(contents: Contents) -> pd.DataFrame:
    """The errors with the file's name first and its key last, where they have a path."""
    table = contents.errors
    assert table is not None
    if "path" not in table or "file" in table:
        return table
    found = table.assign(file=[file_of(path) if isinstance(path, str) else "" for path in table["path"]])
    return found[["file", *(name for name in table if name not in ("key", "path")), "path", *({"key"} & set(table))]]


# Files beside the page -----------------------------------------------------------------------------------------------


def file_name(text: str) -> str:
    """``text`` as the name of a file: letters, digits and ``. _ + -``, at most 80 of them."""
    return PLAIN.sub("-", text).strip("-.")[:80] or "unnamed"


def _write_tables(folder: Path, contents: Contents) -> None:
    tables = {
        **{name: getattr(contents, name) for name in ("scores", "summary", "layers", "combinations", "sweep")},
        **{name: getattr(contents, name) for name in ("curves", "shuffled", "ranks", "ablations", "errors")},
        **{f"paired-{against}": table for against, table in contents.paired.items()},
    }
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        if table is not None:
            write_durably(folder / f"{file_name(name)}.csv", table.to_csv(index=False).encode())
            write_durably(folder / f"{file_name(name)}.parquet", table.to_parquet(index=False))


def _picture(chart: Chart, folder: Path) -> Picture:
    """Draw a chart, write it to ``folder`` as PNG and SVG, and return it for the page."""
    name, light = file_name(chart.name), render(chart, LIGHT, "svg")
    write_durably(folder / f"{name}.svg", light)
    write_durably(folder / f"{name}.png", render(chart, LIGHT, "png"))
    for_light, for_dark = (base64.b64encode(svg).decode() for svg in (light, darkened(light)))
    return Picture(chart, for_light, for_dark, frame(chart.table, chart.title))
