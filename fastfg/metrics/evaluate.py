"""Score attribution maps by faithfulness metrics: plan the masks, run the model once per mask, compute the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.checks import check_images, check_seed, check_target
from fastfg.metrics.choose import DEFAULT_METRICS, choose_metrics
from fastfg.metrics.explanations import Explain, Explanations, explaining
from fastfg.metrics.judge import judge
from fastfg.metrics.localisation import with_masks
from fastfg.metrics.metric import Metric
from fastfg.metrics.outcomes import Verdict, missing_value
from fastfg.metrics.subjects import Images
from fastfg.metrics.unperturbed import read_unperturbed
from fastfg.models import Adapter, find_adapter
from fastfg.models.hold import hold
from fastfg.perturb import Baseline, Batches, Engine, PatchGrid, image_keys
from fastfg.perturb.batches import check_batch_size, default_size
from fastfg.perturb.choose import PATHS, choose_path
from fastfg.perturb.fills import BASELINES, check_baseline, is_named
from fastfg.targets import Target, TargetLike, as_target
from fastfg.types import ScoreError, Scores

IMAGES_AT_ONCE = 32  # planned, read and scored together
ON_GPU = 16  # few, as a group is planned while the GPU runs the one before
REMOVED_ON_GPU = 256  # many, as only masks that remove the same number of patches share a batch


def evaluate(
    model: nn.Module | Adapter | Callable[[Tensor], Any],
    images: Tensor,
    maps: Tensor,
    *,
    target: TargetLike,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    baseline: Baseline = "mean",
    masks: Tensor | None = None,
    seed: int = 0,
    keys: Sequence[str | int] | None = None,
    batch_size: int | None = None,
    path: str = "auto",
    precision: str = "auto",
    explain: Explain | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Mapping[str, Any] | None,
) -> Scores:
    """Faithfulness of ``maps`` as explanations of ``model`` on ``images``.

    Args:
        model: a model of a known family, or any callable ``images -> logits`` [n, classes], or another output that
            ``target`` reads.
        images: [B, C, H, W], the model's own input, after preprocessing, on the model's device.
        maps: [B, gh, gw], or [C, B, gh, gw] for several maps per image; one value per patch.
        target: what is explained (``result.target``): a class, one per image, None for the predicted ones, or a
            :class:`fastfg.Target`. A single logit ``z`` has two classes: 1 with probability ``sigmoid(z)``, and 0 with
            ``1 - sigmoid(z)``. Or a function of the model's output that gives one value per row, from that row alone:
            it is called with rows of many images.
        metrics: names in :data:`fastfg.metrics.METRICS`, or instances of :class:`fastfg.metrics.Metric`.
        baseline: what a removed patch is filled with: ``mean``, ``channel_mean``, ``black``, ``white``, ``zero``,
            ``noise``, ``blur``, ``running_mean``, a number, or a tensor [B] or [B, C]. ``removed``: nothing, the
            tokens of removed patches leave the sequence, for a model of a known family that can lose them. ``imputed``:
            noisy linear imputation from the pixels that are left, always run from the pixels.
        masks: [B, H, W], bool or floating in [0, 1]: where the object is, in the geometry of the images. The
            localisation metrics need it (``pointing_game``, ``relevance_mass``, ``relevance_rank``,
            ``top_k_intersection``, ``roc_auc``, ``iou``). It is an error if none of them is chosen.
            :func:`fastfg.data.read_mask` reads masks from files.
        seed, keys: random draws depend only on the seed and the image's key (None: a hash of its pixels).
        batch_size: the most perturbed images per forward; more of those that have lost tokens. None is 16 on the CPU,
            and on a GPU as many as have 256 x 196 patches (256 images of 224 pixels in patches of 16). A batch that
            does not fit into memory is run again in halves.
        path: ``tokens`` perturbs before the first block, embeds each image's patches once, and computes the last
            block only where the head reads it; ``pixels`` perturbs the images themselves. ``auto`` takes ``tokens``
            for a model of a known family if both give the same logits for these images; the check takes four forwards
            per image and baseline. ``scores.path`` names the path that was used.
        precision: the precision of the forwards. ``float32`` is the model's own (autocast of the caller is
            switched off). ``bfloat16`` and ``float16`` run the
            blocks in that dtype and the head in float32. ``float8`` runs the blocks' linear layers in 8 bits, which
            changes scores slightly (emulated on a CPU). ``auto`` is ``bfloat16`` for a float32 model of a known family
            on a CUDA device, else the model's own.
        explain: the function that made the maps, ``(model, images, target) -> maps`` of the same shape for those
            images, for the metrics that explain again (``max_sensitivity``, ``parameter_randomization``,
            ``efficient_parameter_randomization``, ``random_logit``). It must explain the model and the target that it
            is given: a copy of ``model`` with re-drawn parameters, and classes [b] or the target function. On the
            images as they are, it must give ``maps``. It is an error if it explains ``model`` where it is given a
            re-drawn copy. It is called with at most 8 images (64 on a GPU), with gradients on.
        progress: called with (images done, total images).
        options: {metric: its arguments}, as in ``saco={"n_bins": 10}``; see the class of each metric in
            :mod:`fastfg.metrics`. Each may also set its own ``baseline``.

    Returns :class:`Scores`: float64 [B], or [C, B]. A score that can't be computed or has no meaning is NaN, and
    ``errors`` says why: a map that is not finite or is constant, a blank image, an output that is not finite or does
    not change when patches are removed.

    >>> import torch, fastfg
    >>> def model(images):  # the class is how bright the left half is
    ...     left = images[..., :4].mean((1, 2, 3))
    ...     return torch.stack([left, -left], dim=1)
    >>> images = torch.rand(2, 3, 8, 8)
    >>> maps = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, 2, 2)
    >>> fastfg.evaluate(model, images, maps, target=0, saco={"n_bins": 2}, baseline="zero")["saco"]
    tensor([1., 1.], dtype=torch.float64)
    """
    check_seed(seed)
    check_batch_size(batch_size)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function (images done, total images), got {progress!r}")
    chosen = with_masks(choose_metrics(metrics, options, baseline), masks)
    wanted = as_target(target)
    again = explaining(chosen, explain, wanted)
    reading = [metric for metric in chosen if metric not in again]
    adapter = find_adapter(model)
    explained = check_target(adapter, wanted)
    forward: Any = model if adapter is None else adapter.forward
    stacked, grid = _check(adapter, model, images, maps, chosen, explained)
    names = image_keys(images, keys)
    subjects = Images(images, names, grid, seed, adapter)
    fills = partial(subjects.fills, reading)
    with _still(model, adapter), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        how = path if any(metric.perturbs for metric in reading) or path not in PATHS else "pixels"
        way, way_name = choose_path(adapter, forward, grid, images, fills, how, precision, explained)
        engine = Engine(way, Batches(batch_size or default_size(images.device, grid.n_patches)))
        seen = read_unperturbed(engine, images, explained, None if adapter is None else images.dtype)
        verdicts: list[Verdict] = []
        finish: Callable[[], list[Verdict]] = list
        for rows in _groups(len(images), images.is_cuda, reading):
            begun = judge(engine, reading, subjects, seen, stacked, rows, None if again else progress)
            verdicts += finish()  # scored while a GPU runs the next group
            finish = begun
        verdicts += finish()
    if explain is not None:
        explanations = Explanations(explain, model, subjects, seen, target, stacked, maps.ndim == 3, batch_size)
        explanations.add_outcomes(again, verdicts, progress)
    scores = _collect(chosen, verdicts, names, len(stacked), single=maps.ndim == 3)
    scores.path = way_name
    asked = sum(verdict.asked for verdict in verdicts)
    scores.forwards = {"asked": asked, "run": engine.forwards, "saved": asked - engine.forwards}
    if explain is not None:
        scores.forwards["attributions"] = explanations.explained
    return scores


def _groups(B: int, on_gpu: bool, metrics: Sequence[Metric]) -> Iterator[slice]:
    """The images that are planned, read and scored together."""
    removed = any(is_named(metric.baseline, "removed") for metric in metrics)
    size = IMAGES_AT_ONCE if not on_gpu else REMOVED_ON_GPU if removed else ON_GPU
    return (slice(start, min(start + size, B)) for start in range(0, B, size))


def _still(model: Any, adapter: Adapter | None) -> AbstractContextManager[Any]:
    """A context that holds the model still, if it is a module."""
    if adapter is not None:
        return hold(adapter.model, adapter.flags)
    return hold(model) if isinstance(model, nn.Module) else nullcontext()


def _check(
    adapter: Adapter | None,
    model: Any,
    images: Tensor,
    maps: Tensor,
    metrics: Sequence[Metric],
    target: Target,
) -> tuple[Tensor, PatchGrid]:
    """Check all arguments. Returns the maps as float64 [C, B, P] on the CPU, and the grid of patches."""
    if adapter is None and not callable(model):
        raise TypeError(f"model: expected a model or a callable images -> logits, got {type(model).__name__}")
    check_images(images, adapter.in_chans if adapter else None, adapter.parameter if adapter else None)
    B, size = len(images), (images.shape[-2], images.shape[-1])
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim not in (3, 4):
        got = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps: expected floating [B, gh, gw] or [C, B, gh, gw], got {got}")
    given = (maps.shape[-2], maps.shape[-1])
    if given == size and given != (1, 1):
        raise ValueError(
            f"maps: expected one value per patch, [B, gh, gw] or [C, B, gh, gw], got {list(maps.shape)}, one value per "
            "pixel (average each map over its channels and patches)"
        )
    if maps.shape[-3] != B:
        raise ValueError(f"maps: expected {B} of them, one per image, got {list(maps.shape)}")
    expected = adapter.patches(images) if adapter else None
    if expected is not None and expected != given:
        raise ValueError(
            f"maps: expected {expected[0]} x {expected[1]} patches, as the model has, got {list(maps.shape)}"
        )
    grid = PatchGrid.of(size, given, adapter.patch_size if adapter else None)
    if grid.n_patches < 2:
        raise ValueError(f"maps: expected at least 2 patches per image, got {list(maps.shape)}")
    for metric in metrics:
        assert metric.baseline is not None  # choose_metrics
        colours = bool(adapter and adapter.pixel_mean and adapter.pixel_std)
        check_baseline(metric.baseline, B, images.shape[1], colours, BASELINES)
        metric.check_images(B)
        if not target.has_largest and getattr(metric, "impact", None) == "max":
            raise ValueError(f"{metric.name}: expected impact='target' for a target without probabilities, got 'max'")
    stacked = maps.detach().double().cpu().flatten(-2)
    return (stacked.unsqueeze(0) if maps.ndim == 3 else stacked), grid


def _collect(metrics: Sequence[Metric], verdicts: Sequence[Verdict], names: list[str], C: int, single: bool) -> Scores:
    """Scores, details and errors of all images."""
    scores = Scores({}, image_keys=names)
    for metric in metrics:
        outcomes = [verdict.outcomes[metric.name] for verdict in verdicts]
        values = torch.full((C, len(verdicts)), torch.nan, dtype=torch.float64, device="cpu")
        for i, outcome in enumerate(outcomes):
            values[:, i] = outcome.scores
        for c in range(C):
            for i, outcome in enumerate(outcomes):
                reason = outcome.reasons[c]
                if reason is not None:
                    scores.errors.append(ScoreError(metric.name, None if single else c, i, names[i], reason))
        details = _stack([outcome.details for outcome in outcomes])
        scores.by_metric[metric.name] = values[0] if single else values
        scores.details[metric.name] = {name: t[0] if single else t for name, t in details.items()}
    return scores


def _stack(details: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The details [C, ...] per image, stacked to [C, B, ...]. An image without details gets NaN, or -1 for indices."""
    first: Mapping[str, Tensor] = next((found for found in details if found), {})
    for found in details:
        if found and any(found[name].shape != like.shape for name, like in first.items()):
            raise ValueError("metrics: expected the details of a metric to have the same shapes for every image")
    return {
        name: torch.stack(
            [found[name] if found else torch.full_like(like, missing_value(like)) for found in details], dim=1
        )
        for name, like in first.items()
    }
