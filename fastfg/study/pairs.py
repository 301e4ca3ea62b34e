"""Read a table of scores as differences between variants on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fastfg.metrics import METRICS
from fastfg.study.resampling import Array
from fastfg.study.statistics import IMAGE, check_against, check_targets, key_column

if TYPE_CHECKING:
    import pandas as pd

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.intp]]

SAME = 1e-9  # relative; scores of two variants that differ by less are equal, as readings have seven digits


class Pairs(NamedTuple):
    """The differences of ``K`` comparisons on the same ``n`` images.

    Attributes:
        names: (variant, metric) of each comparison.
        values, base: [n, K] scores of the variant and of the one it is compared with; NaN where missing.
        differences: [n, K] ``values - base``; 0 where it is as small as rounding.
        group: [n] the number of each image's group, from 0. Images with the same key are in one group.
        repeated: whether several images have the same key.
    """

    names: list[tuple[str, str]]
    values: Array
    base: Array
    differences: Array
    group: Numbers
    repeated: bool

    def by_group(self) -> tuple[Array, Array]:
        """Totals and counts [G, K] of the differences per group."""
        there = ~np.isnan(self.differences)
        totals, counts = np.zeros((2, int(self.group.max(initial=-1)) + 1, len(self.names)))
        np.add.at(totals, self.group, np.where(there, self.differences, 0))
        np.add.at(counts, self.group, there)
        return totals, counts


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
    v, w = np.reshape(values, shape).T, np.reshape(base, shape).T
    d = _differences(v, w, np.array([_rounding(scores[metric]) for _, metric in names]))
    group = np.arange(len(images)) if groups is None else _group_numbers(scores, image, images, groups)
    key = _keys(scores, image)
    compared = ~np.isnan(d).all(1)  # blank images share a key, and have no scores that could depend on each other
    merged = _merged(group, np.where(compared, key, key.max(initial=-1) + 1 + np.arange(len(key))))
    return Pairs(names, v, w, d, merged, repeated=len(np.unique(key[compared])) < compared.sum())


def _rounding(column: pd.Series) -> float:
    """The largest relative difference of two scores in ``column`` that is rounding."""
    dtype = getattr(column.dtype, "numpy_dtype", column.dtype)  # of pandas' own types, such as Float32
    return max(SAME, 4 * float(np.finfo(dtype).eps)) if dtype.kind == "f" else SAME


def differences(values: pd.Series, base: pd.Series) -> pd.Series:
    """``values - base`` row by row, 0 where that is as small as rounding."""
    import pandas as pd

    v, w = (column.to_numpy(float)[:, None] for column in (values, base))
    return pd.Series(_differences(v, w, np.array([max(_rounding(values), _rounding(base))]))[:, 0], values.index)


def _differences(values: Array, base: Array, rounding: Array) -> Array:
    """``values - base`` [n, K], 0 where it is rounding [K] for scores of this size: the image's, or typical ones."""
    d, size = values - base, np.fmax(np.abs(values), np.abs(base))
    typical = np.array([np.median(one[~np.isnan(one)]) if (~np.isnan(one)).any() else 0.0 for one in size.T])
    d[np.abs(d) <= rounding * np.maximum(size, typical)] = 0
    return d


def _keys(scores: pd.DataFrame, image: str) -> Numbers:
    """The number of each image's key, from 0. Images with the same key are the same picture."""
    import pandas as pd

    key = key_column(scores)
    n = scores[image].nunique(dropna=False)
    if key is None or key == image:
        return np.arange(n)
    numbers, _ = pd.factorize(scores.drop_duplicates(image)[key])
    return np.where(numbers < 0, np.arange(n) + n, numbers)  # without a key, an image is its own


def _merged(group: Numbers, key: Numbers) -> Numbers:
    """The number of each image's unit, from 0, where images of one group or with one key are in one unit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if len(np.unique(key)) == len(key):
        return group
    first = int(group.max()) + 1
    size = first + int(key.max()) + 1
    edges = coo_array((np.ones(len(group)), (group, first + key)), shape=(size, size))
    _, unit = connected_components(edges, directed=False)
    _, place, numbers = np.unique(unit[group], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(place))[numbers]  # in the order in which they appear


def image_column(scores: pd.DataFrame) -> str:
    """The column that tells images apart.

    Raises ValueError if an image has two rows of the same variant, or another target in another variant.
    """
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
    check_targets(scores)
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
        column = scores.drop_duplicates(image)[groups]
        given = [(name,) if not is_empty(name) else (None, i) for i, name in enumerate(column)]
    else:
        given = group_entries(groups)
        if len(given) != len(images):
            raise ValueError(f"groups: expected {len(images)} entries, one per image, got {len(given)}")
        for name, entry in zip(images, given, strict=True):
            if is_empty(entry):
                raise ValueError(f"groups: expected a group for each image, got none for {name}")
    numbers, _ = pd.factorize(pd.Series(given, dtype=object))
    return np.asarray(numbers)


def is_empty(group: Any) -> bool:
    """Whether an entry of a table (``""`` or missing) says that an image has no group: it is a group by itself."""
    import pandas as pd

    return bool(pd.api.types.is_scalar(group) and (pd.isna(group) or group == ""))  # pd.NA can't be compared


def direction_of(metric: str, own: Mapping[str, bool] | None) -> bool | None:
    """Whether higher is better: by ``own``, else by fastfg's metric of that name; None if neither says it."""
    if own and metric in own:
        return own[metric]
    return METRICS[metric].higher_is_better if metric in METRICS else None
