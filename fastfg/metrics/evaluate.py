"""Judge attribution maps by faithfulness metrics, each image on its own whatever its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.checks import check_images, check_target
from fastfg.metrics import METRICS, Metric, Subjects
from fastfg.metrics.metric import Outcome
from fastfg.models import Adapter, find_adapter
from fastfg.models.hold import hold
from fastfg.perturb.choose import BATCH_ON_CPU, choose_path, fitting_batch
from fastfg.perturb import Engine, PatchGrid, Readings, image_key
from fastfg.perturb.fills import Baseline, check_baseline
from fastfg.targets import Target, resolve_target
from fastfg.types import ScoreError, Scores


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
    path: str = "auto",
    precision: str = "auto",
    saco: Mapping[str, Any] | None = None,
    faithfulness_correlation: Mapping[str, Any] | None = None,
    pixel_flipping: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Faithfulness of ``maps`` as explanations of ``model`` on ``images``.

    Args:
        model: a model of a known family, or any callable ``images -> logits`` [n, classes].
        images: [B, C, H, W], the model's own input, after preprocessing, on the model's device.
        maps: [B, gh, gw], or [C, B, gh, gw] for several attributions of the same images.
        target: the explained classes (``result.target``): an int, one an image, or None for the predicted ones.
        metrics: names of :data:`fastfg.metrics.METRICS`.
        baseline: what a removed patch is filled with: ``mean``, ``channel_mean``, ``black``, ``white``, ``zero``,
            ``noise``, ``blur``, ``running_mean``, a number, or a tensor [B] or [B, C].
        seed, keys: all that is random comes from the seed and the image's own key (None: made of its pixels).
        batch_size: perturbed images a forward, at most; None is 16 on the CPU, and on a GPU what its free memory
            holds, up to 256. A batch that does not fit after all is run again in halves.
        path: ``auto``; ``tokens`` perturbs before the first block, each image's patches being embedded once, and
            computes the last block where the head reads it; ``pixels`` perturbs the images themselves. Both give the
            same logits to rounding, and ``auto`` takes ``tokens`` for a model of a known family where that was found
            to be so (once a model and image size). The one used is ``scores.path``.
        precision: of the forwards: ``auto`` is bfloat16 for a float32 model of a known family on a CUDA device, else
            the model's own, as ``float32`` is; ``bfloat16`` and ``float16`` run the blocks so, the head in float32;
            ``float8`` has their linear layers in 8 bits, which shifts scores a little (emulated on a CPU).
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
    if adapter is not None:
        check_target(adapter, target)
    module: Any = adapter.model if adapter is not None else model
    forward: Any = adapter.forward if adapter is not None else model
    chosen = _metrics(metrics, options, baseline)
    stacked = _check(adapter, module, images, maps, keys, batch_size, chosen)  # [C, B, gh, gw]
    grid = PatchGrid.of((images.shape[-2], images.shape[-1]), (maps.shape[-2], maps.shape[-1]))
    names = [str(key) for key in keys] if keys is not None else [image_key(image) for image in images]
    with _still(module, adapter), torch.no_grad():
        way, way_name = choose_path(adapter, forward, grid, images, path, precision)
        engine = Engine(way, fitting_batch(way, images, batch_size))
        logits = engine.logits(images)
        classes = resolve_target(target, logits)
        before = Readings.of(logits, classes).cpu()
        at_once = max(1, engine.batch_size // BATCH_ON_CPU)  # one on a CPU; on a GPU enough to keep it busy
        parts = []
        for start in range(0, len(images), at_once):
            rows = slice(start, min(start + at_once, len(images)))
            subjects = Subjects(images[rows], classes[rows].cpu(), names[rows], before[rows], grid, seed, start)
            if adapter is not None:
                subjects.pixel_mean, subjects.pixel_std = adapter.pixel_mean, adapter.pixel_std
            parts.append(_ask(chosen, subjects, stacked[:, rows].flatten(2)))
            subjects.submit(engine)
            if progress is not None:
                progress(rows.stop, len(images))
        engine.flush()
    scores = _collect(chosen, parts, names, single=maps.ndim == 3)
    scores.path = way_name
    asked = sum(part.subjects.asked for part in parts)
    scores.forwards = {"asked": asked, "run": engine.forwards, "saved": asked - engine.forwards}
    return scores


def _still(model: Any, adapter: Adapter | None) -> AbstractContextManager[Any]:
    """The model held still, where it is a module."""
    if not isinstance(model, nn.Module):
        return nullcontext()
    return hold(model, adapter.flags if adapter is not None else ())


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
    check_images(images, adapter.in_chans if adapter else None, adapter.parameter if adapter else None)
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


@dataclass
class _Part:
    """Some of the images: what was asked of them, and for which of their maps."""

    subjects: Subjects
    usable: Tensor  # [C, b] bool: the map is finite
    finishes: list[Callable[[], Outcome]]  # one a metric

    def outcomes(self) -> list[Outcome]:
        """Scores [C, b] and details [C, b, ...] of each metric; NaN (-1 for indices) where a map is not usable."""
        return [
            (self._spread(score), {name: self._spread(values) for name, values in details.items()})
            for score, details in (finish() for finish in self.finishes)
        ]

    def _spread(self, values: Tensor) -> Tensor:
        missing = torch.nan if values.is_floating_point() else -1
        spread = torch.full((*self.usable.shape, *values.shape[1:]), missing, dtype=values.dtype)
        spread[self.usable] = values
        return spread


def _ask(metrics: Sequence[Metric], subjects: Subjects, maps: Tensor) -> _Part:
    """Start the metrics on the subjects' finite ``maps`` [C, b, P]."""
    usable = maps.isfinite().all(-1)
    image = usable.nonzero()[:, 1]
    return _Part(subjects, usable, [metric.start(subjects, maps[usable], image) for metric in metrics])


def _collect(metrics: Sequence[Metric], parts: Sequence[_Part], names: list[str], single: bool) -> Scores:
    """Scores, details and errors of all images."""
    scores = Scores({}, image_keys=names)
    usable = torch.cat([part.usable for part in parts], dim=1) if parts else torch.empty(1, 0)
    by_part = [part.outcomes() for part in parts]
    for m, metric in enumerate(metrics):
        outcomes = [outcomes[m] for outcomes in by_part]
        values = torch.cat([score for score, _ in outcomes], dim=1) if outcomes else torch.empty(1, 0).double()
        for c, i in values.isnan().nonzero().tolist():
            why = "the model's logits are not finite" if usable[c, i] else "the attribution is not finite"
            scores.errors.append(ScoreError(metric.name, None if single else c, i, names[i], why))
        detailed = outcomes[0][1] if outcomes else {}
        details = {name: torch.cat([d[name] for _, d in outcomes], dim=1) for name in detailed}
        scores.by_metric[metric.name] = values[0] if single else values
        scores.details[metric.name] = {name: t[0] if single else t for name, t in details.items()}
    return scores
