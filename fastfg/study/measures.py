"""What the variants of a study are judged by: metrics in several modes of removal, and their scores as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastfg.metrics.choose import METRICS, WITHOUT_MASKS
from fastfg.metrics.evaluate import evaluate
from fastfg.models import Adapter

if TYPE_CHECKING:
    import pandas as pd

PRIMARY = "srg"
ORDERS = {"MIF": "deletion", "LIF": "insertion"}  # {order of removal: the metric of its curve}
CURVES = (PRIMARY, *ORDERS.values())  # they share their masks


@dataclass(frozen=True)
class Measure:
    """A metric in one mode of removal.

    Attributes:
        metric: its name. mode: what becomes of removed patches, a ``baseline`` of :func:`fastfg.evaluate`.
        patches_per_step: of a metric that has it, else None.
    """

    metric: str
    mode: str
    patches_per_step: int | None = None

    @property
    def identity(self) -> str:
        """A text that two measures share exactly if they give the same scores."""
        steps = "" if self.patches_per_step is None else f" patches_per_step={self.patches_per_step}"
        return f"{self.metric} {self.mode}{steps}"

    @classmethod
    def of(cls, metrics: Sequence[str], mode: str, patches_per_step: int) -> list[Measure]:
        """One measure per metric."""
        return [
            cls(metric, mode, patches_per_step if hasattr(METRICS[metric], "patches_per_step") else None)
            for metric in metrics
        ]


def patches_per_step(n_patches: int, steps: int) -> int:
    """Of a curve that removes all patches in ``steps`` steps; the first step leaves at least one.

    >>> patches_per_step(256, 3), patches_per_step(4, 2)
    (86, 2)
    """
    return min(math.ceil(n_patches / steps), n_patches - 1)


@dataclass(frozen=True)
class Judged:
    """The scores of some images: rows of the store, and the perturbed forwards that were run for them."""

    rows: list[dict[str, Any]]
    forwards: int


def judge(
    model: Adapter,
    images: Tensor,
    maps: Tensor,
    identities: Sequence[str],
    measures: Sequence[Measure],
    *,
    target: Any,
    keys: Sequence[str],
    seed: int,
    masks: Tensor | None = None,
) -> Judged:
    """Score maps [C, B, gh, gw] by all measures: one row per image, map and measure.

    ``masks`` [B, H, W] go to the modes whose metrics take them.

    Columns: ``key``, ``variant`` (an entry of ``identities``), ``measure``, ``target``, ``score`` (NaN if there is
    none) and ``error`` (why, or None). The points of SRG's two curves have rows of their own, whose measure ends with
    the order and the share of removed patches, as in ``srg mean/MIF/0.5``; their score is the probability.
    """
    rows: list[dict[str, Any]] = []
    forwards = 0
    for mode, of_mode in groupby(sorted(measures, key=lambda one: one.mode), key=lambda one: one.mode):
        own = list(of_mode)
        options: dict[str, Any] = {
            one.metric: {"patches_per_step": one.patches_per_step} for one in own if one.patches_per_step
        }
        scores = evaluate(
            model,
            images,
            maps,
            target=target,
            metrics=[one.metric for one in own],
            baseline=mode,
            keys=keys,
            seed=seed,
            masks=masks if any(one.metric not in WITHOUT_MASKS for one in own) else None,
            **options,
        )
        forwards += scores.forwards["run"]
        why = {(error.metric, error.config or 0, error.image): error.message for error in scores.errors}
        for one in own:
            values, details = scores[one.metric], scores.details[one.metric]
            for c, identity in enumerate(identities):
                for i, key in enumerate(keys):
                    row = {"key": key, "variant": identity, "measure": one.identity, "target": _class(target, i)}
                    rows.append(row | {"score": float(values[c, i]), "error": why.get((one.metric, c, i))})
                    if one.metric == PRIMARY and details:
                        points = _points(details, c, i)
                        rows += [row | {"measure": one.identity + at, "score": y, "error": None} for at, y in points]
    return Judged(rows, forwards)


def _class(target: Any, image: int) -> int | None:
    return int(target[image]) if isinstance(target, Tensor) else None


def _points(details: Mapping[str, Tensor], c: int, i: int) -> list[tuple[str, float]]:
    """(end of the measure's name, probability) for the points of SRG's curves of one map of one image."""
    shares = details["x"][c, i].tolist()
    curves = {order: details[order.lower()][c, i].tolist() for order in ORDERS}
    return [
        (f"/{order}/{share:.6g}", value)
        for order, values in curves.items()
        for share, value in zip(shares, values, strict=True)
        if share == share  # NaN: no curve
    ]


def curves(rows: pd.DataFrame, names: Mapping[str, str], measure: Measure) -> pd.DataFrame:
    """The mean curves of SRG, with a band of two standard errors over images.

    Args: as in :func:`wide`, and one measure.

    Returns one row per point: ``variant``, ``mode``, ``order``, ``fraction``, ``mean``, ``low``, ``high``, ``n``.
    """
    start = f"{measure.identity}/"
    own = rows[rows["measure"].str.startswith(start) & rows["variant"].isin(names)]
    ends = own["measure"].str[len(start) :].str.split("/", expand=True)
    own = own.assign(variant=own["variant"].map(names), order=ends[0], fraction=ends[1].astype(float))
    found = own.groupby(["variant", "order", "fraction"])["score"].agg(["mean", "sem", "count"]).reset_index()
    band = 2 * found["sem"]
    found = found.assign(mode=measure.mode, low=found["mean"] - band, high=found["mean"] + band)
    return found.rename(columns={"count": "n"})[["variant", "mode", "order", "fraction", "mean", "low", "high", "n"]]


def wide(rows: pd.DataFrame, names: Mapping[str, str], measures: Sequence[Measure]) -> pd.DataFrame:
    """The scores of ``measures``, all of one mode, as :func:`fastfg.compare` returns them.

    Args:
        rows: of the store. names: {identity: the variant's name}; other variants are left out.

    Returns one row per image and variant: ``image`` (its key), ``variant``, ``target``, one column per metric, and
    ``error``. Variants are in the order of ``names``, images in that of their keys.
    """
    import pandas as pd

    columns = {one.identity: one.metric for one in measures}
    own = rows[rows["measure"].isin(columns) & rows["variant"].isin(names)]
    own = own.assign(measure=own["measure"].map(columns), variant=own["variant"].map(names))
    at = ["key", "variant"]
    table = own.pivot(index=at, columns="measure", values="score").reindex(columns=list(columns.values()))
    failed = own[own["error"].notna()]
    reasons = (failed["measure"] + ": " + failed["error"]).groupby([failed[name] for name in at]).agg("; ".join)
    order = pd.MultiIndex.from_product([sorted(own["key"].unique()), list(names.values())], names=at)
    target = own.drop_duplicates(at).set_index(at)["target"]
    table = table.reindex(order[order.isin(table.index)])
    table = (
        table.assign(target=target, error=reasons.reindex(table.index)).reset_index().rename(columns={"key": "image"})
    )
    table = table[["image", "variant", "target", *columns.values(), "error"]]
    table.columns.name = None
    table.attrs["metrics"] = list(columns.values())
    return table
