"""The ELPV photographs of the demo, from the installed wheel."""

from __future__ import annotations

from fastfg.data.layouts.elpv import Cells, installed_folder, read_cells

__all__ = ["LICENCE", "Cells", "load_cells"]

LICENCE = "ELPV solar cells (Deitsch et al. 2019), CC-BY-NC-SA 4.0: used here, not redistributed"


def load_cells() -> Cells:
    """The photographs and labels of the installed ``elpv-dataset`` wheel.

    Raises FileNotFoundError with the install command if the wheel is missing.
    """
    return read_cells(installed_folder())
