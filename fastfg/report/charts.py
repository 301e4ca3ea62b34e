"""The charts of a report. Each is one panel, readable at the width of a phone, with its numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastfg.report.names import Names
from fastfg.report.theme import Theme

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST_LINES = 8  # in one chart: more can't be told apart
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
ORDERS = {"MIF": "most important removed first", "LIF": "least important removed first"}


SIZE = (4.4, 3.2)  # inches


class Chart(NamedTuple):
    """One chart.

    Attributes:
        name: of its files. title: above it. alt: what it shows, in words. table: its numbers.
        draw: draws it on axes, in the colours of a theme.
        size: width and height in inches.
    """

    name: str
    title: str
    alt: str
    table: pd.DataFrame
    draw: Callable[[Axes, Theme], None]
    size: tuple[float, float] = SIZE


def difference_charts(names: Names) -> Iterator[Chart]:
    """Per metric: each variant's paired difference with its interval."""
    for against, paired in names.contents.paired.items():
        hidden = set(names.of_role("seed"))
        for metric, rows in _by_metric(paired, names):
            rows = rows.loc[rows["difference"].notna() & ~rows["variant"].isin(hidden)].reset_index(drop=True)
            if not len(rows):
                continue
            real = [verdict in ("better", "worse", "higher", "lower") for verdict in rows["verdict"]]
            title = f"{names.title(metric)}: difference to {against}"
            yield Chart(
                f"difference-{metric}-{against}",
                title,
                f"{title}, with 95% intervals. {'; '.join(map(_said, rows.to_dict('records')))}.",
                rows[["variant", "difference", "low", "high", "p_holm", "n", "verdict"]],
                _forest(rows, real, names.better(metric)),
                (4.4, 1.1 + 0.28 * len(rows)),
            )


def _said(row: dict[Any, Any]) -> str:
    return f"{row['variant']} {row['difference']:.3g}, {row['verdict']}"


def _forest(rows: pd.DataFrame, real: list[bool], better: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        axes.axvline(0, color=theme.faint, linewidth=1)
        for i, row in enumerate(rows.to_dict("records")):
            colour = theme.lines[0] if real[i] else theme.soft
            axes.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=2)
            axes.plot(row["difference"], i, "o", color=colour, markersize=7, fillstyle="full" if real[i] else "none")
        axes.set_yticks(range(len(rows)), [short(name) for name in rows["variant"]])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"difference{f' ({better})' if better else ''}")

    return draw


def layer_charts(names: Names) -> Iterator[Chart]:
    """Per metric: the mean score for each gated block, one line per score kind."""
    return _charts(names, names.contents.layers, "layers", "by gated block", _layers)


def _charts(
    names: Names,
    table: pd.DataFrame | None,
    name: str,
    by: str,
    draw: Callable[[pd.DataFrame, Names, str], Callable[[Axes, Theme], None]],
    height: Callable[[int], float] = lambda rows: SIZE[1],
) -> Iterator[Chart]:
    """One chart per metric of ``table``, if there is one. ``height`` depends on the number of rows."""
    if table is None:
        return
    for metric, rows in _by_metric(table, names):
        title, size = f"{names.title(metric)} {by}", (SIZE[0], height(len(rows)))
        yield Chart(f"{name}-{metric}", title, _alt(title, rows, names, metric), rows, draw(rows, names, metric), size)


def _layers(rows: pd.DataFrame, names: Names, metric: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        if (reference := _reference(rows)) is not None:
            base = next(iter(names.of_role("baseline")), "baseline")
            axes.axhline(reference, color=theme.soft, linestyle="--", linewidth=1.3, label=short(base))
        for i, (kind, line) in enumerate(rows.groupby("score", sort=False)):
            line = line.sort_values("block")
            colour, mean, se = theme.lines[i % len(theme.lines)], line["mean"].to_numpy(float), line["se"]
            axes.fill_between(line["block"], mean - se, mean + se, color=colour, alpha=0.18, linewidth=0)
            axes.plot(line["block"], mean, color=colour, marker=MARKERS[i % 8], markersize=5, label=short(str(kind)))
            chosen = line[_chosen(line)]
            axes.plot(chosen["block"], chosen["mean"], "o", color=theme.ink, markersize=11, fillstyle="none")
        axes.set_xticks(sorted(set(rows["block"])))
        axes.set_xlabel("block")
        _value_axis(axes, names, metric)
        _legend(axes)

    return draw


def combination_charts(names: Names) -> Iterator[Chart]:
    """Per metric: the mean score of each set of gated blocks."""
    by = "by set of gated blocks"
    return _charts(names, names.contents.combinations, "combinations", by, _combinations, lambda n: 1.1 + 0.24 * n)


def _combinations(rows: pd.DataFrame, names: Names, metric: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        if (reference := _reference(rows)) is not None:
            axes.axvline(reference, color=theme.soft, linestyle="--", linewidth=1)
        places, chosen = np.arange(len(rows)), _chosen(rows)
        axes.errorbar(rows["mean"], places, xerr=rows["se"], fmt="none", ecolor=theme.lines[0], linewidth=1.5)
        axes.scatter(rows["mean"], places, color=theme.lines[0], zorder=3, s=26)
        axes.scatter(
            rows["mean"][chosen], places[chosen], facecolors="none", edgecolors=theme.ink, s=120, linewidths=1.3
        )
        axes.set_yticks(places, [short(str(text)) for text in rows["layers"]])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(_with_better(names, metric))

    return draw


def sweep_charts(names: Names) -> Iterator[Chart]:
    """Per metric: the mean score as a heat map over kappa and c_max."""
    return _charts(names, names.contents.sweep, "sweep", "by kappa and c_max", _sweep)


def _sweep(rows: pd.DataFrame, names: Names, metric: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        wide = rows.pivot(index="kappa", columns="c_max", values="mean")
        values = wide.to_numpy(float)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        shown = axes.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
        axes.set_xticks(range(len(wide.columns)), [f"{value:g}" for value in wide.columns])
        axes.set_yticks(range(len(wide.index)), [f"{value:g}" for value in wide.index])
        axes.set_xlabel("c_max (strength)")
        axes.set_ylabel("kappa (sharpness)")
        axes.grid(False)
        for i, kappa in enumerate(wide.index):
            for j, c_max in enumerate(wide.columns):
                value = float(values[i, j])
                dark = value < low + 0.55 * (high - low)
                axes.text(j, i, _number(value), ha="center", va="center", color="white" if dark else "black")
                cell = rows.loc[(rows["kappa"] == kappa) & (rows["c_max"] == c_max)]
                if _chosen(cell).any():
                    axes.add_patch(_outline(j, i, theme))
        bar = axes.figure.colorbar(shown, ax=axes, pad=0.03)
        bar.ax.tick_params(labelsize=8)

    return draw


def _outline(x: int, y: int, theme: Theme) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=theme.accent, linewidth=3)


def curve_charts(names: Names) -> Iterator[Chart]:
    """Per removal mode and order: the readings against the share of removed patches."""
    table = names.contents.curves
    if table is None:
        return
    drawn = [name for name in names.variants if name in set(table["variant"])]
    drawn = [name for name in drawn if names.variants[name].role != "seed"] or drawn
    for (mode, order), rows in table.groupby(["mode", "order"], sort=False):
        kept = [name for name in drawn if name in set(rows["variant"])]
        rows = rows.loc[rows["variant"].isin(kept)]
        title = f"{order}, {ORDERS.get(str(order), '')} ({mode})".replace(",  (", " (")
        ends = rows.sort_values("fraction").groupby("variant", sort=False)["mean"].mean()
        said = "; ".join(f"{name} {_number(ends[name])}" for name in kept)
        wide = rows.pivot(index="fraction", columns="variant", values="mean")[kept].reset_index()
        alt = f"Curves of the reading by share of removed patches, {title}. Means over the curve: {said}."
        for part, lines in enumerate(_parts(kept)):
            name = f"curves-{mode}-{order}" + (f"-{part + 1}" if part else "")
            yield Chart(name, title, alt, wide, _curves(rows, lines, kept))


def _parts(kept: list[str]) -> Iterator[list[str]]:
    """The variants of each chart: the first one or two are in all of them, to compare with."""
    common, others = kept[:2], kept[2:]
    if len(kept) <= MOST_LINES:
        yield kept
        return
    step = MOST_LINES - len(common)
    yield from (common + others[first : first + step] for first in range(0, len(others), step))


def _curves(rows: pd.DataFrame, lines: list[str], kept: list[str]) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        for variant in lines:
            i = kept.index(variant) if variant in kept[:2] else 2 + (kept.index(variant) - 2) % (MOST_LINES - 2)
            line = rows.loc[rows["variant"] == variant].sort_values("fraction")
            colour = theme.lines[i % len(theme.lines)]
            axes.fill_between(line["fraction"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                line["fraction"],
                line["mean"],
                color=colour,
                linestyle=DASHES[i // 2 % 4],
                linewidth=2.2 if i < 2 else 1.5,
                label=short(variant),
            )
        axes.set_xlabel("share of patches removed")
        axes.set_ylabel("reading of the target")
        _legend(axes)

    return draw


def shuffled_charts(names: Names) -> Iterator[Chart]:
    """Per metric and mode: the shuffled decoders' mean scores as a distribution, with the real one marked."""
    table = names.contents.shuffled
    if table is None:
        return
    for metric, rows in _by_metric(table, names):
        modes = list(dict.fromkeys(map(str, rows["mode"]))) if "mode" in rows else [""]
        for mode in modes:
            part = rows.loc[rows["mode"] == mode] if mode else rows
            title = f"{names.title(metric)}: the real decoder among shuffled ones" + (f" ({mode})" if mode else "")
            controls, real = part.loc[part["seed"].notna()], part.loc[part["seed"].isna()]
            rank = _rank(names, metric, mode)
            marked = ", ".join(f"{row['variant']} {_number(row['mean'])}" for row in real.to_dict("records"))
            ends = f"{_number(controls['mean'].min())} to {_number(controls['mean'].max())}"
            alt = f"{title}. {marked}. {len(controls)} shuffled: {ends}. {rank}"
            name = f"shuffled-{metric}" + (f"-{mode}" if mode else "")
            yield Chart(name, title, alt, part, _shuffled(controls, real, rank, names, metric), (4.4, 2.6))


def _rank(names: Names, metric: str, mode: str) -> str:
    """``Rank 3 of 20, p = 0.15`` of the real decoder, if it was ranked."""
    ranks = names.contents.ranks
    if ranks is None:
        return ""
    rows = ranks.loc[ranks["metric"] == metric]
    if "mode" in rows and mode:
        rows = rows.loc[rows["mode"] == mode]
    if len(rows) != 1 or rows["rank"].isna().all():
        return ""
    row = rows.iloc[0]
    return f"Rank {int(row['rank'])} of {int(row['n_shuffled']) + 1}, p = {row['p']:.2g}"


def _shuffled(
    controls: pd.DataFrame, real: pd.DataFrame, rank: str, names: Names, metric: str
) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        values = np.sort(controls["mean"].to_numpy(float))
        bins = min(max(len(values) // 2, 1), 12)
        if len(values):
            heights, _, _ = axes.hist(values, bins=bins, color=theme.soft, alpha=0.45)
            axes.plot(values, np.full(len(values), -0.06 * max(heights)), "|", color=theme.ink, markersize=8)
        for i, row in enumerate(real.to_dict("records")):
            axes.axvline(
                row["mean"],
                color=theme.lines[1 + i % (len(theme.lines) - 1)],
                linewidth=2.5,
                linestyle=DASHES[i % 4],
                label=short(str(row["variant"])),
            )
        axes.set_xlabel(_with_better(names, metric))
        axes.set_ylabel("shuffled decoders")
        axes.locator_params(axis="y", integer=True)
        if rank:
            axes.set_title(rank, fontsize=9, loc="right", color=theme.ink)
        _legend(axes)

    return draw


def ablation_charts(names: Names) -> Iterator[Chart]:
    """Predicted against actual change, of the gate and of the logit, when a feature is taken out."""
    table = names.contents.ablations
    if table is None or not len(table):
        return
    for kind, what in (("gate", "gate of the patch"), ("logit", "target's logit")):
        rows = table[["image", "block", "feature", f"predicted_{kind}", f"actual_{kind}"]].dropna()
        rows = rows.assign(image=[names.image(str(key)) for key in rows["image"]])
        x, y = rows[f"predicted_{kind}"].to_numpy(float), rows[f"actual_{kind}"].to_numpy(float)
        said = f"n = {len(rows)}"
        if len(rows) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            said += f", r = {np.corrcoef(x, y)[0, 1]:.2f}"
        title = f"Change of the {what} without a feature"
        yield Chart(
            f"ablation-{kind}", title, f"{title}: predicted against actual, {said}.", rows, _scatter(x, y, said)
        )


def _scatter(x: Any, y: Any, said: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=theme.soft, linestyle="--", linewidth=1, label="predicted = actual")
        axes.scatter(x, y, s=18, color=theme.lines[0], alpha=0.6, linewidths=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("actual")
        axes.set_title(said, fontsize=9, loc="right", color=theme.ink)
        _legend(axes)

    return draw


# Parts that several charts share ---------------------------------------------------------------------------------


def _by_metric(table: pd.DataFrame, names: Names) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each metric: first those that the report shows, in its order, then others."""
    there = list(dict.fromkeys(table["metric"]))
    for metric in [*(m for m in names.metrics if m in there), *(m for m in there if m not in names.metrics)]:
        yield metric, table.loc[table["metric"] == metric].reset_index(drop=True)


def _chosen(rows: pd.DataFrame) -> Any:
    return rows["chosen"].to_numpy(bool) if "chosen" in rows else np.zeros(len(rows), bool)


def _alt(title: str, rows: pd.DataFrame, names: Names, metric: str) -> str:
    text = f"{title}, {names.better(metric)}".rstrip(", ")
    text += f". Means from {_number(rows['mean'].min())} to {_number(rows['mean'].max())}"
    return f"{text}; the chosen one is marked." if _chosen(rows).any() else f"{text}."


def _reference(rows: pd.DataFrame) -> float | None:
    """The baseline's mean on the same images; None if the table does not have it."""
    there = rows["reference"].dropna() if "reference" in rows else rows["mean"][:0]
    return float(there.iloc[0]) if len(there) else None


def _with_better(names: Names, metric: str) -> str:
    better = names.better(metric)
    return short(names.title(metric), 34) + (f" ({better})" if better else "")


def _value_axis(axes: Axes, names: Names, metric: str) -> None:
    axes.set_ylabel(_with_better(names, metric))


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2, frameon=False, fontsize=8.5)


def _number(value: float) -> str:
    return "missing" if value != value else f"{value:.3g}"


def short(name: str, most: int = 26) -> str:
    """``name`` with at most ``most`` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
