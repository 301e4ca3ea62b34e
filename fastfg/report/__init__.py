"""Show results as tables, figures, overlays and an HTML page."""

from fastfg.report.figure import save_figure
from fastfg.report.overlay import displayed, save_overlay
from fastfg.report.page import write_page
from fastfg.report.table import differences, markdown_table, table_cells

__all__ = ["differences", "displayed", "markdown_table", "save_figure", "save_overlay", "table_cells", "write_page"]
