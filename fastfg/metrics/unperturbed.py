"""Read the images as they are, and check that the model gives an image the same output in every batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfg.metrics.row_by_row import check_row_by_row
from fastfg.metrics.subjects import Unperturbed
from fastfg.perturb import Engine, Readings
from fastfg.targets import Function, Target

FINE = 1e-5  # the rounding of float32 and float64 is below this
SAME = 0.01  # an output that differs by more than this share of the largest is another output


def read_unperturbed(engine: Engine, images: Tensor, target: Target, own: torch.dtype | None) -> Unperturbed:
    """What the model makes of the images as they are. Raises ValueError if it does not repeat its output.

    Args:
        own: the dtype of a model of a known family; None for another one.
    """
    if not len(images):
        return Unperturbed(Readings.empty(0, images.device), target, 0.0, 0)
    parts: list[Tensor] = []

    def keep(output: Any, rows: slice) -> None:
        if isinstance(target, Function):
            check_row_by_row(target, output, rows.stop - rows.start)
        parts.append(target.keep(output, rows.stop - rows.start).clone())  # the model may reuse its output buffer

    engine.whole(images, keep)
    kept = torch.cat(parts)
    _check_repeats(engine, images, target, kept)
    resolved = target.of(kept)
    eps = max(torch.finfo(dtype).eps for dtype in (kept.dtype, own or kept.dtype))
    return Unperturbed(Readings(*resolved.read_kept(kept)).cpu(), resolved, eps if eps < FINE else 0.0, kept.shape[1])


def _check_repeats(engine: Engine, images: Tensor, target: Target, kept: Tensor) -> None:
    """Raise ValueError where the model gives other outputs for the same images in another batch.

    The second batch has the images of the first in another order, and another image in place of the first one. A single
    image gets another one beside it. With batches of one image, the model runs on the same image again.
    """
    n = min(len(images), engine.batches.size)
    order = list(range(n - 1, 0, -1)) or [0]
    other = [_other(images[:1])] if len(order) < engine.batches.size else []
    second, parts = torch.cat([images[order], *other]), list[Tensor]()

    def work(rows: slice) -> None:
        output = engine.path.whole(second[rows].clone())
        parts.append(target.keep(output, rows.stop - rows.start).double().clone())

    engine.batches.run(len(second), work)
    again, expected = torch.cat(parts), kept[order].double()
    eps = max(engine.paths.eps, torch.finfo(kept.dtype).eps)
    error = _difference(again, expected, 1.0 if target.needs_logits and eps > FINE else 1e-30)
    if error > same_within(eps):
        raise ValueError(
            f"model: expected the same output for an image in every batch, got a difference of {error:.0%} "
            "(dropout, batch norm in training mode, or a hook that mixes images?)"
        )


def same_within(eps: float) -> float:
    """How far outputs of an image may differ by rounding alone, where ``eps`` is that of the forwards.

    Kernels for batches of other sizes round in other places, and what they differ by grows through the blocks.
    """
    return SAME if eps < FINE else max(0.05, min(8 * eps, 0.1))


def _difference(again: Tensor, expected: Tensor, least: float) -> float:
    """The largest difference of the first rows of ``again`` to ``expected``, as a share of the largest output.

    ``least``: outputs are at least so large. Logits near 0, as those of a model that can't tell its classes apart, are
    all rounding where few digits are left.
    """
    found = again[: len(expected)]
    same = (found == expected) | (found.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (found - expected).abs()).nan_to_num(torch.inf, torch.inf)
    finite = (part.abs().nan_to_num(0.0, 0.0, 0.0).amax() for part in (again, expected))
    return float(error.amax() / torch.stack([*finite]).amax().clamp(min=least))


def _other(image: Tensor) -> Tensor:
    """An image [1, C, H, W] that differs from ``image``, with values from the same range: its negative.

    Of a constant image it is half of it, or 1 for zeros, which are pixels too where they are from 0 to 1.
    """
    low, high = image.amin(), image.amax()
    return low + high - image if low < high else torch.where(image == 0, 1.0, image / 2)
