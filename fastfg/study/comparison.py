"""Explain the same images with several gates and methods, and score the maps side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfg.attribution.attribute import SAEs, attribute
from fastfg.attribution.choose_methods import methods_by_name
from fastfg.checks import check_seed
from fastfg.metrics import DEFAULT_METRICS, METRICS, Metric
from fastfg.metrics.choose import choose_metrics
from fastfg.metrics.evaluate import evaluate
from fastfg.metrics.explanations import ByPlace, explains_again
from fastfg.metrics.localisation import with_masks
from fastfg.models import Adapter
from fastfg.perturb import Baseline
from fastfg.perturb.fills import is_per_image
from fastfg.perturb.seeds import image_keys
from fastfg.study.pairs import group_entries
from fastfg.targets import Target, TargetLike
from fastfg.types import METHODS as OTHER_METHODS
from fastfg.types import Attribution, Gate, Methods, Scores

if TYPE_CHECKING:
    import pandas as pd

IMAGES_ON_CPU, IMAGES_ON_GPU = 8, 64  # images per attribution
OF_EVALUATE = ("batch_size", "path", "precision", "explain")  # arguments that go on to it
OF_A_BATCH = ("metrics", "baseline", "masks", "progress")  # those that compare has itself
VANILLA: dict[str, Gate | None] = {"vanilla": None}


class Comparison(NamedTuple):
    """One batch of images under several gates and methods.

    Attributes:
        scores: one row per image and variant: ``index`` (the image's position in the batch), ``image`` (its key),
            ``group`` if there are groups, ``variant``, ``target``, and one column per metric.
        errors: one row per missing score: ``index``, ``image``, ``variant``, ``metric``, ``message``.
        attribution: the attribution of all gates, with a leading dimension ``C``.
        maps: {variant: [B, gh, gw]}, first the gates, then the methods.
    """

    scores: pd.DataFrame
    errors: pd.DataFrame
    attribution: Attribution
    maps: dict[str, Tensor]


def compare(
    model: nn.Module | Adapter,
    images: Tensor | Iterable[Tensor | Sequence[Any]],
    *,
    gates: Mapping[str, Gate | None] = VANILLA,
    methods: Methods = (),
    saes: SAEs | Mapping[str, SAEs] | None = None,
    target: TargetLike = None,
    keys: Iterable[str | int] | None = None,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    baseline: Baseline = "mean",
    masks: Tensor | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Explain images with each of ``gates`` and ``methods`` and score every map. Work that several need is done once.

    One forward and one backward pass serve all gates. A perturbed forward that several maps or metrics need is run
    once. Apart from the table, memory does not grow with the number of images.

    Args:
        model: a model of a known family.
        images: [B, C, H, W], or an iterable of batches: tensors, or tuples whose first entry is the tensor, as a
            DataLoader of (image, label) gives them; labels are not used.
        gates: {name of the variant: its Gate, or None for vanilla}.
        saes: {block: SAE}, for all gates, or {name of a gate: {block: SAE}}, to compare SAEs with each other.
        methods: more variants, as in :func:`fastfg.attribute`: names such as ``random`` and ``grad_cam``, or {name of
            the variant: such a name, maps [images, gh, gw], or a callable ``(images, target) -> maps``, which is called
            for each batch}.
        target: None (the predicted class), an int, one per image, a :class:`fastfg.Target`, or a function of the
            model's output.
        keys: the images' names, one per image; None: a hash of the pixels. Images with the same key count as one
            image in the statistics (:func:`fastfg.study.paired`). groups: what images belong to, such as patients, one
            per image.
        seed: what random draws of methods and metrics depend on, with the keys.
        metrics, baseline, masks: as in :func:`fastfg.evaluate`. Per-image arguments
            (``masks``, ``subsets``, a tensor ``baseline``) have one entry per image over all batches.
        progress: called with (images done, total images, or None if the total is not known).
        options: more arguments of :func:`fastfg.evaluate`, and {method: its arguments}.

    Returns a table with one row per image and variant: ``index`` (the image's position), ``image`` (its key),
    ``group`` (if there are groups), ``variant``, ``target``, one column per metric, and ``error``: why a score is
    missing (NaN), or None. Raises ValueError if two variants have the same name, or if the number of keys, targets or
    other per-image arguments differs from the number of images.

    >>> import torch, fastfg
    >>> model = fastfg.models.timm.import_timm().create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    >>> gates = {"vanilla": None, "gated": fastfg.Gate((1,), score="gradient_x_residual")}
    >>> table = fastfg.compare(model, torch.randn(2, 3, 64, 64), gates=gates)
    >>> list(table["variant"])
    ['vanilla', 'gated', 'vanilla', 'gated']
    """
    import pandas as pd

    _check_options("compare", options, OF_EVALUATE)
    check_seed(seed)
    keys = None if keys is None else list(keys)
    groups = None if groups is None else group_entries(groups)
    by_name = methods_by_name(methods)
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
            methods=_methods_of(by_name, rows),
            saes=saes,
            target=target[rows] if isinstance(target, Target) else _part("target", target, rows),
            keys=_part("keys", keys, rows),
            groups=_part("groups", groups, rows),
            seed=seed,
            metrics=[metric.for_images(rows) for metric in chosen],
            **_starting_at(options, _part("integrated_gradients.baseline", _starts(options), rows)),
        )
        tables.append(_with_errors(found, first=done))
        done = rows.stop
        if progress is not None:
            progress(done, total)
    per_image = target.per_image() if isinstance(target, Target) else {"target": target}
    maps = {f"methods[{name!r}]": method for name, method in by_name.items() if hasattr(method, "__array__")}
    others = {"keys": keys, "groups": groups, "integrated_gradients.baseline": _starts(options)}
    for name, values in (per_image | maps | others).items():
        if _is_per_image(values) and len(values) != done:
            raise ValueError(f"{name}: expected {done} of them, one per image, got {len(values)}")
    for metric in chosen:
        metric.check_images(done)
    if not tables:
        raise ValueError("images: expected at least one batch, got none")
    table = pd.concat(tables, ignore_index=True)
    table.attrs["metrics"] = [metric.name for metric in chosen]
    return table


def compare_batch(
    model: nn.Module | Adapter,
    images: Tensor,
    *,
    gates: Mapping[str, Gate | None] = VANILLA,
    methods: Methods = (),
    saes: SAEs | Mapping[str, SAEs] | None = None,
    target: TargetLike = None,
    keys: Sequence[str | int] | None = None,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    scored: Collection[str] | None = None,
    **options: Any,
) -> Comparison:
    """:func:`compare` for images that fit into one attribution; also returns the maps.

    ``scored`` are the variants to score, at least one of them; None: all.
    """
    _check_options("compare_batch", options, (*OF_EVALUATE, *OF_A_BATCH))
    check_seed(seed)
    methods = methods_by_name(methods)
    _check_variants(gates, methods)
    if groups is not None and len(groups) != len(images):
        raise ValueError(f"groups: expected {len(images)} of them, one per image, got {len(groups)}")
    own = {name: options.pop(name) for name in OTHER_METHODS if name in options}
    by_gate = _saes_by_gate(saes, gates)
    explained: Callable[..., Attribution] = partial(attribute, saes=by_gate, gate=list(gates.values()), seed=seed)
    attribution = explained(model, images, target=target, methods=methods, keys=keys, **own)
    maps = dict(zip(gates, attribution.maps, strict=True)) | attribution.methods
    judged = [name for name in maps if scored is None or name in scored]
    stacked = torch.stack([maps[name] for name in judged])
    if explains_again(options.get("metrics", ())):
        hashes, names, starts = image_keys(images, None), image_keys(images, keys), _starts(own)

        def explain(given: Any, images: Tensor, target: Any, places: list[int]) -> list[Tensor | None]:
            pairs = zip(image_keys(images, None), places, strict=True)
            own_keys = [names[i] if key == hashes[i] else key for key, i in pairs]  # an image with noise has its own
            others = _made_again(methods, given is model)
            more = _starting_at(own, None if starts is None else starts[places])
            again = explained(given, images, target=target, methods=others, keys=own_keys, **more)
            of = dict(zip(gates, again.maps, strict=True)) | {name: again.methods.get(name) for name in methods}
            return [of[name] for name in judged]

        options = {"explain": ByPlace(explain)} | options
    scores = evaluate(model, images, stacked, target=attribution.target, keys=keys, seed=seed, **options)
    return Comparison(*tidy(scores, judged, attribution.target, groups), attribution, maps)


def _check_options(function: str, options: Mapping[str, Any], others: Sequence[str]) -> None:
    """Require names of metrics and methods, or of ``others``."""
    if unknown := [name for name in options if name not in (*METRICS, *OTHER_METHODS, *others)]:
        raise TypeError(
            f"{function}: unexpected argument {unknown[0]!r}; expected options of metrics and methods by their name, "
            f"or {', '.join(others)}"
        )


def _starts(options: Mapping[str, Any]) -> Tensor | None:
    """The baseline of integrated gradients, if it has one entry per image."""
    given = options.get("integrated_gradients")
    baseline = given.get("baseline") if isinstance(given, Mapping) else None
    return baseline if is_per_image(baseline) else None


def _starting_at(options: Mapping[str, Any], baseline: Tensor | None) -> dict[str, Any]:
    """``options`` with another baseline for integrated gradients; None: unchanged."""
    if baseline is None:
        return dict(options)
    return {**options, "integrated_gradients": {**options["integrated_gradients"], "baseline": baseline}}


def _made_again(methods: Mapping[str, Any], same_model: bool) -> dict[str, Any]:
    """The methods that can explain another image: not given maps, and callables only the same model."""
    return {
        name: method for name, method in methods.items() if isinstance(method, str) or (callable(method) and same_model)
    }


def _check_variants(gates: Mapping[str, Gate | None], methods: Iterable[str]) -> None:
    """Require at least one gate, and another name for each variant."""
    if not isinstance(gates, Mapping) or not gates:
        raise ValueError(f"gates: expected {{name: Gate or None}} with at least one of them, got {gates!r}")
    other = [name for name in gates if not isinstance(name, str)]
    if other:
        raise ValueError(f"gates: expected names as text, got {other}")
    both = [name for name in methods if name in gates]
    if both:
        raise ValueError(f"methods: expected other names than those of the gates, got {both}")


def _saes_by_gate(saes: Any, gates: Mapping[str, Gate | None]) -> Any:
    """``saes`` as :func:`fastfg.attribute` takes them: for all gates, or a list with those of each gate."""
    if not isinstance(saes, Mapping) or not any(isinstance(name, str) for name in saes):
        return saes
    if other := [name for name in saes if name not in gates]:
        raise ValueError(f"saes: expected names of gates, {', '.join(map(repr, gates))}, got {other}")
    if without := [name for name, gate in gates.items() if gate is not None and gate.needs_sae and not saes.get(name)]:
        raise ValueError(f"saes: expected {{block: SparseAutoencoder}} for {', '.join(map(repr, without))}, got none")
    return [saes.get(name) for name in gates]


def tidy(
    scores: Scores, variants: Sequence[str], target: Any, groups: Sequence[Any] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores [C, B] as a table with one row per image and variant, and the errors as a second table."""
    import pandas as pd

    group = [] if groups is None else ["group"]
    rows = [
        {
            "index": i,
            "image": key,
            "group": None if groups is None else groups[i],
            "variant": variant,
            "target": _class(target, i),
        }
        | {metric: float(values[c, i]) for metric, values in scores.items()}
        for i, key in enumerate(scores.image_keys)
        for c, variant in enumerate(variants)
    ]
    errors = [
        {"index": e.image, "image": e.key, "variant": variants[e.config or 0], "metric": e.metric, "message": e.message}
        for e in scores.errors
    ]
    table = pd.DataFrame(rows, columns=["index", "image", *group, "variant", "target", *scores])
    table.attrs["metrics"] = list(scores)  # so that a column which is added later is not judged as a metric
    return (
        table,
        pd.DataFrame(errors, columns=["index", "image", "variant", "metric", "message"]),
    )


def _class(target: Any, image: int) -> int | None:
    """The explained class of one image; None for a target without classes."""
    classes = target.classes if isinstance(target, Target) else target
    return int(classes[image]) if isinstance(classes, Tensor) else None


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


def _methods_of(methods: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """``methods`` for some of the images: maps from elsewhere have one entry per image."""
    return {
        name: _part(f"methods[{name!r}]", method, rows) if hasattr(method, "__array__") else method
        for name, method in methods.items()
    }


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
