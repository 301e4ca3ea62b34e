"""The figure: one row per image with the photograph, the maps of two variants, their difference, and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastfg.metrics import METRICS
from fastfg.report.contents import Array, Contents, ImageEntry
from fastfg.report.names import Names
from fastfg.report.overlay import COLOURS, STRENGTH
from fastfg.types import heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40  # with more images, those at both ends of the order
AT_EACH_END = 10
SIZE = 2.1  # of one picture, in inches


def save_figure(path: Path, contents: Contents) -> None:
    """Write the figure of ``contents.images`` to ``path``. The differences of all rows have one scale.

    With more than 40 images, it has the ten that gained most and the ten that lost most by the first metric.
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is text
        _figure(Names(contents)).savefig(path, dpi=150 if len(contents.images) <= 12 else 90)


def _figure(names: Names) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pair, images = names.pair, _chosen(names)
    if pair is None or not images:
        raise ValueError("images: expected images with the maps of two variants, got none")
    heats = {image.key: _heats(image) for image in images}
    largest = max(float(np.abs(one[pair[1]] - one[pair[0]]).max()) for one in heats.values()) or 1.0
    controls = [name for name in names.of_role("control", "seed") if all(name in one for one in heats.values())]
    columns = ["photograph", *pair, "difference", *controls]
    figure = Figure(figsize=(len(columns) * SIZE, len(images) * (SIZE + 0.62) + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    figure.suptitle(names.contents.title, fontsize=12)
    for axis, heading in zip(axes[0], columns, strict=True):
        axis.set_title("\n".join(wrap(heading, 24)), fontsize=9.5, fontweight="bold")
    for image, line in zip(images, axes, strict=True):
        shown = _draw(image, heats[image.key], [*pair, *controls], pair, largest, line)
        for axis, name in zip([*line[1:3], *line[4:]], [*pair, *controls], strict=True):
            axis.set_xlabel(_scores(names, image.key, name), fontsize=7)
        line[0].set_xlabel(caption(image), fontsize=7)
    for place, (drawn, label) in zip((0, 1), shown, strict=True):
        bar = figure.colorbar(drawn, ax=axes[-1, 2 * place : 2 * place + 2], location="bottom", aspect=30, pad=0.03)
        bar.set_label(label.format(*pair), fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def caption(image: ImageEntry) -> str:
    """The image's name, class and probability, in short lines."""
    lines = [image.name if len(image.name) <= 34 else f"…{image.name[-33:]}"]
    if image.label is not None:
        lines.append(f"class: {image.label}")
    if image.predicted is not None:
        probability = "" if image.probability is None else f", p = {image.probability:.2f}"
        lines.append(f"predicted: {image.predicted}{probability}")
    return "\n".join(lines)


def _heats(image: ImageEntry) -> dict[str, Array]:
    """Each finite map of an image over its picture [H, W], between 0 and 1."""
    size = (image.picture.shape[0], image.picture.shape[1])
    finite = {name: one for name, one in image.maps.items() if np.isfinite(one).all()}
    return {name: heatmap(torch.as_tensor(one, dtype=torch.float64), size).numpy() for name, one in finite.items()}


def _chosen(names: Names) -> list[ImageEntry]:
    """The images that have both maps: all of them, or those at both ends of the order."""
    contents, pair = names.contents, names.pair
    there = [
        one for one in contents.images if pair and all(np.isfinite(one.maps.get(name, np.nan)).all() for name in pair)
    ]
    if len(there) <= MOST_ROWS or not names.metrics or pair is None:
        return there[:MOST_ROWS]
    metric = names.metrics[0]
    rows = contents.scores.drop_duplicates([contents.key, "variant"])
    wide = rows.pivot(index=contents.key, columns="variant", values=metric)
    gain = (wide[pair[1]] - wide[pair[0]]) * (-1 if names.higher_is_better(metric) is False else 1)
    order = sorted((one for one in there if gain.get(one.key) == gain.get(one.key)), key=lambda one: -gain[one.key])
    return order if len(order) <= 2 * AT_EACH_END else order[:AT_EACH_END] + order[-AT_EACH_END:]


def _draw(
    image: ImageEntry, heats: dict[str, Array], order: Sequence[str], pair: tuple[str, str], largest: float, axes: Any
) -> list[tuple[Any, str]]:
    """Draw one row, and return what its colour bars show, with their labels."""
    for axis in axes:
        axis.imshow(image.picture)
        axis.set_xticks([])
        axis.set_yticks([])
    places: list[Axes] = [*axes[1:3], *axes[4:]]
    for axis, name in zip(places, order, strict=True):
        heat = axis.imshow(heats[name], cmap=COLOURS, alpha=STRENGTH, vmin=0, vmax=1)
    difference = heats[pair[1]] - heats[pair[0]]
    changed = axes[3].imshow(difference, cmap="RdBu_r", alpha=0.85, vmin=-largest, vmax=largest)
    scale = "{1} minus {0}, one scale for all images"
    return [(heat, "relevancy, each map from its smallest to its largest value"), (changed, scale)]


def _scores(names: Names, key: str, variant: str) -> str:
    """The first scores of one map, one per line."""
    contents = names.contents
    row = contents.scores.loc[(contents.scores[contents.key] == key) & (contents.scores["variant"] == variant)]
    if not len(row):
        return " "
    shown = names.metrics[:3]
    return "\n".join(f"{_short(names, name)} {_number(float(row.iloc[0][name]))}" for name in shown) or " "


def _short(names: Names, metric: str) -> str:
    return METRICS[metric].short if metric in METRICS else names.title(metric)


def _number(value: float) -> str:
    return "missing" if value != value else f"{value:.3f}"
