"""Colours of the charts, light and dark, and how a chart becomes a file."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastfg.report.charts import Chart


class Theme(NamedTuple):
    """Colours: of text, of quiet and of faint lines, of the paper, of a mark on a heat map, and of the data.

    A colour that stands twice in one theme does so in the other: :func:`darkened` replaces them in place.

    The data's colours can be told apart with any colour vision (Okabe and Ito 2008), and have a contrast of at least
    3:1 with the paper.
    """

    ink: str
    soft: str
    faint: str
    paper: str
    accent: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "#1b1f24",
    "#5c6670",
    "#c9d0d8",
    "#fdfefe",
    "#e0457b",
    ("#0060a8", "#c44e00", "#00795a", "#a8327d", "#7a5c00", "#4b4fc4", "#5c6670", "#a61e1e"),
)
DARK = Theme(
    "#e7ebf0",
    "#9aa6b2",
    "#46505a",
    "#15191e",
    "#ff7aa8",
    ("#64b5f6", "#ffa25c", "#4fd1a5", "#f48fc8", "#e6c34a", "#a9acff", "#9aa6b2", "#ff8a80"),
)
# A $ in a name is text. The same salt gives the same bytes.
SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "fastfg", "font.size": 10, "text.parse_math": False}


def darkened(svg: bytes) -> bytes:
    """An SVG of the theme ``LIGHT`` in the colours of ``DARK``."""
    pairs = [*zip(LIGHT[:5], DARK[:5], strict=True), *zip(LIGHT.lines, DARK.lines, strict=True)]
    to = {light.encode(): dark.encode() for light, dark in pairs}
    return re.sub(rb"#[0-9a-f]{6}\b", lambda found: to.get(found[0], found[0]), svg)


def render(chart: Chart, theme: Theme, kind: str) -> bytes:
    """``chart`` as a file: ``kind`` is ``svg`` or ``png``. The same chart gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        **SETTINGS,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), theme.soft),
        "grid.color": theme.faint,
        "axes.facecolor": theme.paper,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=chart.size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.5, alpha=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        chart.draw(axes, theme)
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=120, facecolor=theme.paper, metadata=metadata)
        return out.getvalue()
