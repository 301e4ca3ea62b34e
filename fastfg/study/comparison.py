"""Explain the same images with several gates, and score the maps side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastfg.attribution.attribute import attribute
from fastfg.metrics import DEFAULT_METRICS, METRICS, Metric
from fastfg.metrics.choose import choose_metrics
from fastfg.metrics.evaluate import evaluate
from fastfg.metrics.localisation import with_masks
from fastfg.models import Adapter
from fastfg.perturb import Baseline
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import Target
from fastfg.types import Attribution, Gate, Scores

if TYPE_CHECKING:
    import pandas as pd

IMAGES_ON_CPU, IMAGES_ON_GPU = 8, 64  # images per attribution


class Comparison(NamedTuple):
    """One batch of images under several gates.

    Attributes:
        scores: one row per image and variant: ``index`` (the image's position in the batch), ``image`` (its key),
            ``variant``, ``target``, and one column per metric.
        errors: one row per missing score: ``index``, ``image``, ``variant``, ``metric``, ``message``.
        attribution: the attribution of all variants, with a leading dimension ``C``.
    """

    scores: pd.DataFrame
    errors: pd.DataFrame
    attribution: Attribution


def compare(
    model: nn.Module | Adapter,
    images: Tensor | Iterable[Tensor | Sequence[Any]],
    *,
    gates: Mapping[str, Gate | None],
    saes: Mapping[int, SparseAutoencoder] | None = None,
    target: Target = None,
    keys: Iterable[str | int] | None = None,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    baseline: Baseline = "mean",
    masks: Tensor | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Explain images with each of ``gates`` and score every map. Work that several maps need is done once.

    One forward and one backward pass serve all gates. A perturbed forward that several maps or metrics need is run
    once. Apart from the table, memory does not grow with the number of images.

    Args:
        model: a model of a known family.
        images: [B, C, H, W], or an iterable of batches: tensors, or tuples whose first entry is the tensor, as a
            DataLoader of (image, label) gives them; labels are not used.
        gates: {name of the variant: its Gate, or None for vanilla}. saes: {block: SAE}, for all gates.
        target: None (the predicted class), an int, one per image, or a function of the model's output.
        keys: the images' names, one per image. metrics, baseline, masks: as in :func:`fastfg.evaluate`. Per-image
            arguments (``masks``, ``subsets``, a tensor ``baseline``) have one entry per image over all batches.
        progress: called with (images done, total images, or None if the total is not known).
        options: more arguments of :func:`fastfg.evaluate`.

    Returns a table with one row per image and variant: ``index`` (the image's position), ``image`` (its key),
    ``variant``, ``target``, one column per metric, and ``error``: why a score is missing (NaN), or None. Raises
    ValueError if the number of keys, targets or other per-image arguments differs from the number of images.

    >>> import torch, fastfg
    >>> model = fastfg.models.timm.import_timm().create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    >>> gates = {"vanilla": None, "gated": fastfg.Gate((1,), score="gradient_x_residual")}
    >>> table = fastfg.compare(model, torch.randn(2, 3, 64, 64), gates=gates)
    >>> list(table["variant"])
    ['vanilla', 'gated', 'vanilla', 'gated']
    """
    import pandas as pd

    keys = None if keys is None else list(keys)
    by_metric = {name: options.pop(name) for name in METRICS if name in options}
    chosen = with_masks(choose_metrics(metrics, by_metric, baseline), masks)
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
            metrics=[metric.for_images(rows) for metric in chosen],
            **options,
        )
        tables.append(_with_errors(found, first=done))
        done = rows.stop
        if progress is not None:
            progress(done, total)
    for name, values in (("target", target), ("keys", keys)):
        if _is_per_image(values) and len(values) != done:  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected {done} of them, one per image, got {len(values)}")  # type: ignore[arg-type]
    for metric in chosen:
        metric.check_images(done)
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
    """:func:`compare` for images that fit into one attribution; also returns the maps."""
    attribution = attribute(model, images, saes=saes, gate=list(gates.values()), target=target)
    scores = evaluate(model, images, attribution.maps, target=attribution.target, keys=keys, **options)
    return Comparison(*tidy(scores, list(gates), attribution.target), attribution)


def tidy(scores: Scores, variants: Sequence[str], target: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores [C, B] as a table with one row per image and variant, and the errors as a second table."""
    import pandas as pd

    rows = [
        {"index": i, "image": key, "variant": variant, "target": int(target[i]) if isinstance(target, Tensor) else None}
        | {metric: float(values[c, i]) for metric, values in scores.items()}
        for i, key in enumerate(scores.image_keys)
        for c, variant in enumerate(variants)
    ]
    errors = [
        {"index": e.image, "image": e.key, "variant": variants[e.config or 0], "metric": e.metric, "message": e.message}
        for e in scores.errors
    ]
    return (
        pd.DataFrame(rows, columns=["index", "image", "variant", "target", *scores]),
        pd.DataFrame(errors, columns=["index", "image", "variant", "metric", "message"]),
    )


def _with_errors(found: Comparison, first: int) -> pd.DataFrame:
    """The scores with a column ``error``. ``first`` is the position of the batch's first image among all images."""
    import pandas as pd

    messages: dict[tuple[Any, Any], str] = {}  # by position, because two images may have the same key
    for error in found.errors.itertuples(index=False):
        at, text = (error[0], error.variant), f"{error.metric}: {error.message}"
        messages[at] = f"{messages[at]}; {text}" if at in messages else text
    pairs = zip(found.scores["index"], found.scores["variant"], strict=True)
    reasons = pd.Series([messages.get(pair) for pair in pairs], dtype=object)
    return found.scores.assign(index=found.scores["index"] + first, error=reasons)


def _batches(images: Tensor | Iterable[Tensor | Sequence[Any]]) -> Iterator[Tensor]:
    """The images in batches that are small enough for one attribution."""
    for number, given in zip(count(), [images] if isinstance(images, Tensor) else images):
        batch = given[0] if isinstance(given, (tuple, list)) and given else given
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"images: expected tensors [B, C, H, W], or tuples that begin with one, got {type(given).__name__} in "
                f"batch {number}"
            )
        yield from batch.split(IMAGES_ON_CPU if batch.device.type == "cpu" else IMAGES_ON_GPU)


def _is_per_image(values: Any) -> bool:
    one_for_all = values is None or isinstance(values, Integral) or callable(values)
    return not one_for_all and getattr(values, "ndim", 1) > 0


def _part(name: str, values: Any, rows: slice) -> Any:
    """The entries of ``values`` for ``rows`` if it has one entry per image; else ``values`` unchanged."""
    if not _is_per_image(values):
        return values
    if len(values) < rows.stop:
        raise ValueError(f"{name}: expected one per image, got {len(values)} for {rows.stop} images or more")
    return values[rows]
