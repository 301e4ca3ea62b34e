"""Judge attribution maps by faithfulness metrics, each image on its own whatever its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.checks import Target, check_images, resolve_target
from fastfg.metrics import METRICS, Metric, Subject
from fastfg.metrics.metric import Outcome
from fastfg.models import Adapter, find_adapter
from fastfg.models.hold import hold
from fastfg.perturb import Engine, PatchGrid, Readings, image_key
from fastfg.perturb.baselines import Baseline, check_baseline
from fastfg.types import ScoreError, Scores

BATCH_ON_CPU, BATCH_ON_GPU = 16, 256


def evaluate(
    model: nn.Module | Adapter | Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    *,
    target: Target,
    metrics: Sequence[str] = tuple(METRICS),
    baseline: Baseline = "mean",
    seed: int = 0,
    keys: Sequence[str | int] | None = None,
    batch_size: int | None = None,
    saco: Mapping[str, Any] | None = None,
    faithfulness_correlation: Mapping[str, Any] | None = None,
    pixel_flipping: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Faithfulness of ``maps`` as explanations of ``model`` on ``images``.

    Args:
        model: a model of a known family, or any callable ``images -> logits`` [n, classes].
        images: [B, C, H, W], the model's own input, after preprocessing.
        maps: [B, gh, gw], or [C, B, gh, gw] for several attributions of the same images.
        target: the explained classes (``result.target``): an int, one an image, or None for the predicted ones.
        metrics: names of :data:`fastfg.metrics.METRICS`.
        baseline: what a removed patch is filled with: ``mean``, ``channel_mean``, ``black``, ``white``, ``zero``,
            ``noise``, ``blur``, ``running_mean``, a number, or a tensor [B] or [B, C].
        seed, keys: all that is random comes from the seed and the image's own key (None: made of its pixels).
        batch_size: perturbed images a forward; None is 16 on the CPU and 256 on a GPU.
        saco: ``n_bins``, ``impact``. faithfulness_correlation: ``n_runs``, ``n_trials``, ``subset_size``,
            ``correlation``, ``subsets``. pixel_flipping: ``patches_per_step``. Each may hold a ``baseline`` of its own.
        progress: called with (images done, images in all).

    Returns :class:`Scores`: float64 [B], or [C, B]. An image whose score can't be computed has NaN there and an
    entry in ``errors``.

    >>> import torch, fastfg
    >>> def model(images):  # the class is how bright the left half is
    ...     left = images[..., :4].mean((1, 2, 3))
    ...     return torch.stack([left, -left], dim=1)
    >>> images = torch.rand(2, 3, 8, 8)
    >>> maps = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, 2, 2)
    >>> fastfg.evaluate(model, images, maps, target=0, saco={"n_bins": 2}, baseline="zero")["saco"]
    tensor([1., 1.], dtype=torch.float64)
    """
    options = {"saco": saco, "faithfulness_correlation": faithfulness_correlation, "pixel_flipping": pixel_flipping}
    adapter = find_adapter(model)
    module: Any = adapter.model if adapter is not None else model
    forward: Any = adapter.forward if adapter is not None else model
    chosen = _metrics(metrics, options, baseline)
    stacked = _check(adapter, module, images, maps, keys, batch_size, chosen)  # [C, B, gh, gw]
    grid = PatchGrid.of((images.shape[-2], images.shape[-1]), (maps.shape[-2], maps.shape[-1]))
    batch = batch_size or (BATCH_ON_CPU if images.device.type == "cpu" else BATCH_ON_GPU)
    names = [str(key) for key in keys] if keys is not None else [image_key(image) for image in images]
    still = hold(module) if isinstance(module, nn.Module) else nullcontext()
    with still, torch.no_grad():
        engine = Engine(forward, grid, batch)
        logits = engine.logits(images)
        classes = resolve_target(target, logits)
        before = Readings.of(logits, classes)
        subjects = [
            Subject(
                engine,
                images[i],
                i,
                names[i],
                int(classes[i]),
                seed,
                before[slice(i, i + 1)],
                adapter.pixel_mean if adapter else None,
                adapter.pixel_std if adapter else None,
            )
            for i in range(len(images))
        ]
        started = []
        for i, subject in enumerate(subjects):
            flat = stacked[:, i].flatten(1)
            usable = flat.isfinite().all(-1)
            started.append((usable, [metric.start(subject, flat[usable]) for metric in chosen]))
            if progress is not None:
                progress(i + 1, len(subjects))
        engine.flush()
    outcomes = [(usable, [finish() for finish in finishes]) for usable, finishes in started]
    scores = _collect(chosen, outcomes, names, single=maps.ndim == 3)
    scores.forwards = {"asked": sum(s.asked for s in subjects), "run": engine.run}
    return scores


def _metrics(names: Sequence[str], options: Mapping[str, Mapping[str, Any] | None], baseline: Baseline) -> list[Metric]:
    """The metrics by name, each with its own options over the common baseline."""
    made = []
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: expected names among {tuple(METRICS)}, got {name!r}")
        try:
            made.append(METRICS[name](**{"baseline": baseline, **(options[name] or {})}))
        except TypeError as error:
            raise TypeError(f"{name}: unexpected option ({error})") from None
    return made


def _check(
    adapter: Adapter | None,
    model: Any,
    images: Tensor,
    maps: Tensor,
    keys: Sequence[str | int] | None,
    batch_size: int | None,
    metrics: Sequence[Metric],
) -> Tensor:
    """The maps as float64 [C, B, gh, gw] on the CPU, after all arguments were looked at."""
    if adapter is None and not callable(model):
        raise TypeError(f"model: expected a model or a callable images -> logits, got {type(model).__name__}")
    dtype = adapter.parameter.dtype if adapter else None
    check_images(images, adapter.in_chans if adapter else None, dtype)
    B = len(images)
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim not in (3, 4):
        got = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps: expected floating [B, gh, gw] or [C, B, gh, gw], got {got}")
    if maps.shape[-3] != B:
        raise ValueError(f"maps: expected {B} of them, one an image, got {list(maps.shape)}")
    grid = adapter.grid((images.shape[-2], images.shape[-1])) if adapter else None
    if grid is not None and grid != (maps.shape[-2], maps.shape[-1]):
        raise ValueError(f"maps: expected {grid[0]} x {grid[1]} patches, as the model has, got {list(maps.shape)}")
    if keys is not None and len(keys) != B:
        raise ValueError(f"keys: expected {B} of them, one an image, got {len(keys)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    for metric in metrics:
        check_baseline(metric.baseline, B, images.shape[1], bool(adapter and adapter.pixel_mean and adapter.pixel_std))
    stacked = maps.detach().double().cpu()
    return stacked.unsqueeze(0) if maps.ndim == 3 else stacked


def _collect(
    metrics: Sequence[Metric], outcomes: Sequence[tuple[Tensor, list[Outcome]]], names: list[str], single: bool
) -> Scores:
    """Scores, details and errors of all images; what a map that is not finite left out becomes NaN."""
    scores = Scores({}, image_keys=names)
    for m, metric in enumerate(metrics):
        columns: list[Tensor] = []
        details: dict[str, list[Tensor]] = {}
        for i, (usable, parts) in enumerate(outcomes):
            score, detail = parts[m]
            column = _spread(score, usable)
            columns.append(column)
            for name, tensor in detail.items():
                details.setdefault(name, []).append(_spread(tensor, usable))
            for c in column.isnan().nonzero().flatten().tolist():
                why = "the model's logits are not finite" if usable[c] else "the attribution is not finite"
                scores.errors.append(ScoreError(metric.name, None if single else c, i, names[i], why))
        scores.by_metric[metric.name] = _stack(columns, single)
        scores.details[metric.name] = {name: _stack(parts, single) for name, parts in details.items()}
    return scores


def _spread(values: Tensor, usable: Tensor) -> Tensor:
    """``values`` of the usable maps, back in their places among all maps: NaN (or -1 for indices) elsewhere."""
    missing = torch.nan if values.is_floating_point() else -1
    spread = torch.full((len(usable), *values.shape[1:]), missing, dtype=values.dtype)
    spread[usable] = values
    return spread


def _stack(per_image: list[Tensor], single: bool) -> Tensor:
    """B of [C, ...] -> [C, B, ...], or [B, ...] for a single map."""
    stacked = torch.stack(per_image, dim=1) if per_image else torch.empty(1, 0, dtype=torch.float64)
    return stacked[0] if single else stacked
