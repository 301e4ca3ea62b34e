"""Several ways of explaining the same images, judged side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastfg.attribution.attribute import attribute
from fastfg.metrics.evaluate import evaluate
from fastfg.models import Adapter
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import Target
from fastfg.types import Attribution, Gate, Scores

if TYPE_CHECKING:
    import pandas as pd

IMAGES_ON_CPU, IMAGES_ON_GPU = 8, 64  # attributed at a time


class Comparison(NamedTuple):
    """``scores``: a row an image x variant (image, variant, target, and a column a metric). ``errors``: a row for
    each score that could not be computed. ``attribution``: of all variants, with a leading ``C``.
    """

    scores: pd.DataFrame
    errors: pd.DataFrame
    attribution: Attribution


def compare(
    model: nn.Module | Adapter,
    images: Tensor | Iterable[Tensor],
    *,
    gates: Mapping[str, Gate | None],
    saes: Mapping[int, SparseAutoencoder] | None = None,
    target: Target = None,
    keys: Sequence[str | int] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Attribute images under each of ``gates`` and judge every map, all that can be shared being shared.

    One forward and one backward pass serve all gates; a perturbed forward that several maps or metrics need is run
    once. What is in memory does not grow with the number of images, but for the table.

    Args:
        model: of a known family. images: [B, C, H, W], or an iterable of such batches (a DataLoader of tensors).
        gates: {name of the variant: its Gate, or None for vanilla}. saes: {block: SAE}, for all of the gates.
        target: None (the predicted class), an int, or one an image. keys: the images' names, one an image.
        progress: called with (images done, images in all, or None where that is not known).
        options: for :func:`fastfg.evaluate`.

    Returns a table, a row an image x variant: ``image`` (its key), ``variant``, ``target``, a column a metric, and
    ``error``: why a score is missing (NaN), or None. Raises ValueError where keys or targets are not one an image.

    >>> import timm, torch, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    >>> gates = {"vanilla": None, "gated": fastfg.Gate((1,), score="gradient_x_residual")}
    >>> table = fastfg.compare(model, torch.randn(2, 3, 64, 64), gates=gates)
    >>> list(table["variant"])
    ['vanilla', 'gated', 'vanilla', 'gated']
    """
    import pandas as pd

    total = len(images) if isinstance(images, Tensor) else None
    tables, done = [], 0
    for batch in _batches(images):
        rows = slice(done, done + len(batch))
        found = compare_batch(
            model,
            batch,
            gates=gates,
            saes=saes,
            target=_part("target", target, rows),
            keys=_part("keys", keys, rows),
            **options,
        )
        tables.append(_with_errors(found))
        done = rows.stop
        if progress is not None:
            progress(done, total)
    for name, values in (("target", target), ("keys", keys)):
        if _is_per_image(values) and len(values) != done:  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected {done} of them, one an image, got {len(values)}")  # type: ignore[arg-type]
    if not tables:
        raise ValueError("images: expected at least one batch, got none")
    return pd.concat(tables, ignore_index=True)


def compare_batch(
    model: nn.Module | Adapter,
    images: Tensor,
    *,
    gates: Mapping[str, Gate | None],
    saes: Mapping[int, SparseAutoencoder] | None = None,
    target: Target = None,
    keys: Sequence[str | int] | None = None,
    **options: Any,
) -> Comparison:
    """:func:`compare` for images that are attributed in one pass, with the maps themselves."""
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


def _with_errors(found: Comparison) -> pd.DataFrame:
    """The scores with a column ``error``."""
    messages: dict[tuple[Any, Any], str] = {}
    for error in found.errors.itertuples():
        at, text = (error.image, error.variant), f"{error.metric}: {error.message}"
        messages[at] = f"{messages[at]}; {text}" if at in messages else text
    pairs = zip(found.scores["image"], found.scores["variant"], strict=True)
    import pandas as pd

    return found.scores.assign(error=pd.Series([messages.get(pair) for pair in pairs], dtype=object))


def _batches(images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """At most as many images at a time as one attribution takes."""
    for number, batch in zip(count(), [images] if isinstance(images, Tensor) else images):
        if not isinstance(batch, Tensor):
            raise TypeError(f"images: expected tensors [B, C, H, W], got {type(batch).__name__} in batch {number}")
        yield from batch.split(IMAGES_ON_CPU if batch.device.type == "cpu" else IMAGES_ON_GPU)


def _is_per_image(values: Any) -> bool:
    return values is not None and not isinstance(values, int) and not (isinstance(values, Tensor) and values.ndim == 0)


def _part(name: str, values: Any, rows: slice) -> Any:
    """Of ``values`` that are one an image, those of ``rows``."""
    if not _is_per_image(values):
        return values
    if len(values) < rows.stop:
        raise ValueError(f"{name}: expected one an image, got {len(values)} for {rows.stop} images or more")
    return values[rows]
