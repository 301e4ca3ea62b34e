"""The figure: one row per image with the photograph, the vanilla map, the gated map and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastfg.metrics import METRICS
from fastfg.report.overlay import COLOURS
from fastfg.types import heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class FigureRow(NamedTuple):
    """One image: its name, the picture [H, W, 3], two maps [gh, gw], and {metric: score} per map."""

    name: str
    picture: Tensor
    vanilla: Tensor
    gated: Tensor
    vanilla_scores: Mapping[str, float]
    gated_scores: Mapping[str, float]


def save_figure(path: Path, rows: Sequence[FigureRow], title: str, columns: tuple[str, str]) -> None:
    """Write the figure to ``path``; ``columns`` names the two methods."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    size = 2.35
    figure, axes = plt.subplots(
        len(rows), 4, figsize=(4 * size + 0.5, len(rows) * (size + 0.2) + 1.4), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for axis, heading in zip(axes[0], ("photograph", *columns, f"{columns[1]} minus {columns[0]}"), strict=True):
        axis.set_title(heading, fontsize=10, fontweight="bold")
    shown = None
    for row, line in zip(rows, axes, strict=True):
        shown = _draw(row, line)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=0.24, aspect=25, pad=0.02, anchor=(0.985, 1.0))
        bar.set_label("difference, relative to the largest in the image", fontsize=8)
        bar.set_ticks([-1, 0, 1])
        bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(row: FigureRow, axes: Sequence[Axes]):  # type: ignore[no-untyped-def]
    size = (row.picture.shape[0], row.picture.shape[1])
    vanilla, gated = heatmap(row.vanilla.cpu(), size), heatmap(row.gated.cpu(), size)
    difference = gated - vanilla
    largest = float(difference.abs().max()) or 1.0
    for axis in axes:
        axis.imshow(row.picture.numpy())
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, heat, scores in ((axes[1], vanilla, row.vanilla_scores), (axes[2], gated, row.gated_scores)):
        axis.imshow(heat.numpy(), cmap=COLOURS, alpha=0.65, vmin=0, vmax=1)
        axis.set_xlabel("  ".join(f"{_short(name)} {value:.2f}" for name, value in scores.items()), fontsize=7.5)
    axes[0].set_xlabel(row.name, fontsize=7.5)
    axes[3].set_xlabel(" ", fontsize=7.5)  # an empty label keeps the images of a row at the same height
    return axes[3].imshow(torch.as_tensor(difference / largest).numpy(), cmap="RdBu_r", alpha=0.85, vmin=-1, vmax=1)


def _short(metric: str) -> str:
    """The short name of a metric."""
    return METRICS[metric].short if metric in METRICS else metric
