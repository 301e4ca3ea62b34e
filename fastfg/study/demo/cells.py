"""ELPV: 2,624 electroluminescence photographs of solar cells, with one defect probability per photograph.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence images",
Solar Energy 185 (2019). Licence CC-BY-NC-SA 4.0. The photographs are read from the user's installation and never
redistributed.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from fastfg.study.demo.wheels import wheel_file

WHEEL = "elpv-dataset==1.0.0.post1"
LICENCE = "ELPV solar cells (Deitsch et al. 2019), CC-BY-NC-SA 4.0: used here, not redistributed"


class Cells(NamedTuple):
    """The files (300 x 300 pixels, grey), with the probability of a defect and the kind of wafer per file."""

    paths: list[Path]
    probability: list[float]
    kind: list[str]  # "mono" or "poly"


def load_cells() -> Cells:
    """The photographs and labels of the installed ``elpv-dataset`` wheel.

    Raises FileNotFoundError with the install command if the wheel is missing.
    """
    labels = wheel_file(WHEEL, "elpv_dataset/data/labels.csv")
    with labels.open(newline="") as file:
        rows = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
    return Cells([labels.parent / row[0] for row in rows], [float(row[1]) for row in rows], [row[2] for row in rows])
