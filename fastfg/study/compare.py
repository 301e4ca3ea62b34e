"""Several ways of explaining the same images, judged side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastfg.attribution import attribute
from fastfg.checks import Target
from fastfg.evaluation import evaluate
from fastfg.models import Adapter
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import Attribution, Gate, Scores

if TYPE_CHECKING:
    import pandas as pd


class Comparison(NamedTuple):
    """``scores``: a row an image x variant (image, variant, target, and a column a metric). ``errors``: a row for
    each score that could not be computed. ``attribution``: of all variants, with a leading ``C``.
    """

    scores: pd.DataFrame
    errors: pd.DataFrame
    attribution: Attribution


def compare(
    model: nn.Module | Adapter,
    images: Tensor,
    *,
    gates: Mapping[str, Gate | None],
    saes: Mapping[int, SparseAutoencoder] | None = None,
    target: Target = None,
    keys: Sequence[str | int] | None = None,
    **options: Any,
) -> Comparison:
    """Attribute ``images`` under each of ``gates`` (one forward and backward for all) and evaluate every map.

    Args:
        gates: {name of the variant: its Gate, or None for vanilla}. keys: the images' names.
        options: for :func:`fastfg.evaluate`.
    """
    attribution = attribute(model, images, saes=saes, gate=list(gates.values()), target=target)
    scores = evaluate(model, images, attribution.maps, target=attribution.target, keys=keys, **options)
    return Comparison(*tidy(scores, list(gates), attribution.target), attribution)


def tidy(scores: Scores, variants: Sequence[str], target: Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores [C, B] as a table with a row an image x variant, and their errors as another."""
    import pandas as pd

    rows = [
        {"image": key, "variant": variant, "target": int(target[i])}
        | {metric: float(values[c, i]) for metric, values in scores.items()}
        for i, key in enumerate(scores.image_keys)
        for c, variant in enumerate(variants)
    ]
    errors = [
        {"image": e.key, "variant": variants[e.config or 0], "metric": e.metric, "message": e.message}
        for e in scores.errors
    ]
    return (
        pd.DataFrame(rows, columns=["image", "variant", "target", *scores]),
        pd.DataFrame(errors, columns=["image", "variant", "metric", "message"]),
    )
