"""Read a table of scores as differences between variants on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastfg.metrics import METRICS
from fastfg.metrics.choose import RESERVED
from fastfg.study.resampling import Array
from fastfg.study.statistics import check_against

if TYPE_CHECKING:
    import pandas as pd

IMAGE = ("index", "path", "image")  # the first of these columns that is there tells the images apart


class Pairs(NamedTuple):
    """The differences of ``K`` comparisons on the same ``n`` images.

    Attributes:
        names: (variant, metric) of each comparison.
        values, base: [n, K] scores of the variant and of the one it is compared with; NaN where missing.
        group: [n] the number of each image's group, from 0.
    """

    names: list[tuple[str, str]]
    values: Array
    base: Array
    group: np.ndarray[Any, np.dtype[np.intp]]

    @property
    def differences(self) -> Array:
        return self.values - self.base

    def by_group(self) -> tuple[Array, Array]:
        """Totals and counts [G, K] of the differences per group."""
        there = ~np.isnan(self.differences)
        totals, counts = np.zeros((2, int(self.group.max(initial=-1)) + 1, len(self.names)))
        np.add.at(totals, self.group, np.where(there, self.differences, 0))
        np.add.at(counts, self.group, there)
        return totals, counts


def metric_columns(
    scores: pd.DataFrame, metrics: Sequence[str] | None = None, groups: str | Sequence[Any] | None = None
) -> list[str]:
    """The columns of ``scores`` that hold metrics. Raises ValueError for unknown or non-numeric ones."""
    from pandas.api.types import is_numeric_dtype

    others = {*RESERVED, groups} if isinstance(groups, str) else set(RESERVED)
    found = [name for name in scores.columns if name not in others]
    for name in found if metrics is None else metrics:
        if name not in found:
            raise ValueError(f"metrics: expected some of {found}, got {name!r}")
        if not is_numeric_dtype(scores[name]):
            raise ValueError(f"scores: expected numbers in the column {name!r}, got {scores[name].dtype}")
    return found if metrics is None else list(metrics)


def pairs(
    scores: pd.DataFrame, metrics: Sequence[str], against: str, groups: str | Sequence[Any] | None = None
) -> Pairs:
    """All comparisons of ``scores`` with the variant ``against``, image by image."""
    variants = check_against(scores, against)
    image = image_column(scores)
    images = list(dict.fromkeys(scores[image]))
    names, values, base = [], [], []
    for metric in metrics:
        wide = scores.pivot(index=image, columns="variant", values=metric).reindex(images)
        columns = {variant: wide[variant].to_numpy(float) for variant in variants}
        if any(np.isinf(column).any() for column in columns.values()):
            raise ValueError(f"scores: expected finite numbers or NaN in the column {metric!r}, got an infinite one")
        for variant in variants:
            if variant != against:
                names.append((variant, metric))
                values.append(columns[variant])
                base.append(columns[against])
    shape = (len(names), len(images))
    group = np.arange(len(images)) if groups is None else _group_numbers(scores, image, images, groups)
    return Pairs(names, np.reshape(values, shape).T, np.reshape(base, shape).T, group)


def image_column(scores: pd.DataFrame) -> str:
    """The column that tells images apart. Raises ValueError if an image has two rows of the same variant."""
    image = next((name for name in IMAGE if name in scores.columns), None)
    if image is None:
        raise ValueError(f"scores: expected one of the columns {IMAGE}, got {list(scores.columns)}")
    if image == "index" and "image" in scores.columns:
        several = scores.groupby("index", sort=False)["image"].nunique() > 1
        if several.any():
            raise ValueError(
                f"scores: expected one image per index, got several for index {several.idxmax()!s} (tables of "
                "different images that were put together?)"
            )
    twice = scores.loc[scores.duplicated([image, "variant"]), [image, "variant"]]
    if len(twice):
        name, variant = twice.iloc[0]
        raise ValueError(
            f"scores: expected one row per {image} and variant, got two for {image} {name!r} and variant {variant!r}"
        )
    return image


def group_entries(groups: Any) -> list[Any]:
    """``groups`` as a list with one entry per image; a tensor or an array gives its values.

    Raises TypeError for a mapping or a pandas Series, whose entries belong to keys and not to places.
    """
    if isinstance(groups, (str, Mapping)) or (hasattr(groups, "index") and hasattr(groups, "to_numpy")):
        got = type(groups).__name__
        raise TypeError(f"groups: expected a list, an array or a tensor, one entry per image in their order, got {got}")
    return list(groups.tolist() if hasattr(groups, "tolist") else groups)


def _group_numbers(
    scores: pd.DataFrame, image: str, images: list[Any], groups: str | Sequence[Any]
) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The number of each image's group, from 0."""
    import pandas as pd

    if isinstance(groups, str):
        if groups not in scores.columns:
            raise ValueError(f"groups: expected a column of scores, {list(scores.columns)}, got {groups!r}")
        several = scores.groupby(image, sort=False)[groups].nunique(dropna=False) > 1
        if several.any():
            raise ValueError(f"groups: expected one {groups} per image, got several for {several.idxmax()!s}")
        given = scores.drop_duplicates(image)[groups].tolist()
    else:
        given = group_entries(groups)
        if len(given) != len(images):
            raise ValueError(f"groups: expected {len(images)} entries, one per image, got {len(given)}")
    numbers, _ = pd.factorize(pd.Series(given, dtype=object))
    if (numbers < 0).any():
        raise ValueError(f"groups: expected a group for each image, got none for {images[int(numbers.argmin())]}")
    return np.asarray(numbers)


def direction_of(metric: str, own: Mapping[str, bool] | None) -> bool | None:
    """Whether higher is better: by ``own``, else by fastfg's metric of that name; None if neither says it."""
    if own and metric in own:
        return own[metric]
    return METRICS[metric].higher_is_better if metric in METRICS else None
