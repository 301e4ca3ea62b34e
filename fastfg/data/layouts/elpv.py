"""ELPV: 2,624 electroluminescence photographs of solar cells, with one defect probability per photograph.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence images",
Solar Energy 185 (2019). Licence CC-BY-NC-SA 4.0. The photographs are read from the user's installation and never
redistributed.
"""

from __future__ import annotations

import csv
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from fastfg.data.manifest import Manifest, build, draw
from fastfg.data.wheels import wheel_file

WHEEL = "elpv-dataset==1.0.0.post1"
LABELS = "labels.csv"
PUBLISHED = f"https://github.com/zae-bayern/elpv-dataset, or pip install --no-deps {WHEEL}"
SPLIT_OF_RUN = {1: "test", 6: "test", 3: "validation", 8: "validation"}  # all others: train
RUNS = 10
DEFECTIVE = 0.5  # the least probability of a cell that is labelled defective


class Cells(NamedTuple):
    """The files (300 x 300 pixels, grey), with the probability of a defect and the kind of wafer per file."""

    paths: list[Path]
    probability: list[float]
    kind: list[str]  # "mono" or "poly"


def installed_folder() -> Path:
    """The folder with ``labels.csv`` in the installed wheel. Raises FileNotFoundError with the install command."""
    return wheel_file(WHEEL, f"elpv_dataset/data/{LABELS}").parent


def read_cells(folder: Path) -> Cells:
    """The photographs and labels in ``folder``, which holds ``labels.csv`` and ``images``.

    Raises FileNotFoundError if ``labels.csv`` is missing, and ValueError for a row that is no label.
    """
    labels = folder / LABELS
    if not labels.is_file():
        raise FileNotFoundError(f"elpv: expected {LABELS} and images in {folder}, got no {LABELS} ({PUBLISHED})")
    cells = Cells([], [], [])
    with labels.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.reader(file, delimiter=" ", skipinitialspace=True):
            if len(row) < 3 or row[2] not in ("mono", "poly"):
                raise ValueError(f"elpv: expected a file, a probability, and mono or poly in {labels}, got {row}")
            cells.paths.append(folder / row[0])
            cells.probability.append(float(row[1]))
            cells.kind.append(row[2])
    return cells


def elpv(
    folder: str | Path | None = None,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Manifest:
    """The manifest of ELPV, split so that modules are kept apart as far as the data tell.

    The label is ``defective`` for a probability of a defect of at least 0.5, else ``functional``. It counts the 106
    photographs with 2/3 as defective, and the 295 with 1/3 as functional: the experts were not sure of either.

    The 44 modules are not named in the data. A module has one kind of wafer, and the files are in ten runs of equal
    kind, so a run is the ``group``: 1 and 6 are the test split (590 photographs), 3 and 8 validation (360), and the
    others training (1,674). Each split has both kinds of wafers, and 29, 48 and 29% defective cells; early runs have
    far more of them than late ones. Two splits share no module if the files of each module follow one another, which is
    likely but not stated by the authors. Within a run, photographs of one module are not independent: with 2 groups
    in the test split, an interval that takes photographs as independent is too narrow.

    Args:
        folder: with ``labels.csv`` and ``images``, as published; None uses the installed wheel.
        train, validation, test: how many photographs of the split to draw, by the hash of seed and key; None keeps
            all. The share of defective ones is that of the runs, and differs between them.
        seed: of the draw.

    Raises FileNotFoundError if parts are missing, with where to get them, and ValueError for other files or more
    photographs than a split has.
    """
    root = installed_folder() if folder is None else Path(folder)
    cells = read_cells(root)
    missing = [path for path in cells.paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"elpv: expected the {len(cells.paths)} files of {LABELS} in {root}, got none for {len(missing)}, such as "
            f"{missing[0]} ({PUBLISHED})"
        )
    runs = [run for run, (_, cell) in enumerate(groupby(cells.kind), start=1) for _ in cell]
    if runs[-1:] != [RUNS]:
        raise ValueError(f"elpv: expected {RUNS} runs of mono and poly in {root / LABELS}, got {max(runs, default=0)}")
    made = build(
        {
            "path": path,
            "label": "defective" if probability >= DEFECTIVE else "functional",
            "split": SPLIT_OF_RUN.get(run, "train"),
            "group": f"run-{run:02d}",
        }
        for path, probability, run in zip(cells.paths, cells.probability, runs, strict=True)
    )
    table = made.table
    for name, n in (("train", train), ("validation", validation), ("test", test)):
        table = draw(table, name, n, seed)
    return made._replace(table=table)
