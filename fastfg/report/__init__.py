"""Show results as tables, figures, overlays and an HTML page."""

from fastfg.report.contents import Claim, Condition, Contents, Effect, ImageEntry, Variant
from fastfg.report.figure import save_figure
from fastfg.report.overlay import displayed, save_overlay
from fastfg.report.page import write_report
from fastfg.report.table import differences, markdown_table, table_cells

__all__ = [
    "Claim",
    "Condition",
    "Contents",
    "Effect",
    "ImageEntry",
    "Variant",
    "differences",
    "displayed",
    "markdown_table",
    "save_figure",
    "save_overlay",
    "table_cells",
    "write_report",
]
