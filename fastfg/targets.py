"""Targets: the class whose logit is explained, or a function that maps the model's output to one value per image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TargetFunction = Callable[[Tensor], Tensor]  # the model's output -> one value per image [B], differentiable
Target = int | Sequence[int] | Tensor | TargetFunction | None

log = logging.getLogger("fastfg")
_logged_one_logit = False


def n_classes(logits: Tensor) -> int:
    """The number of classes of ``logits`` [B, n]: ``n``, or 2 for a single logit, which is read as a sigmoid."""
    return 2 if logits.shape[1] == 1 else logits.shape[1]


def resolve_target(target: int | Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    """The target classes as int64 [B], on the device of ``logits`` [B, n]; None stands for the predicted class.

    A single logit ``z`` has two classes: 1, whose probability is ``sigmoid(z)``, and 0, with ``1 - sigmoid(z)``.
    """
    B, n = len(logits), n_classes(logits)
    if n == 0:
        raise ValueError(f"model: expected logits of at least one class, got {list(logits.shape)}")
    if logits.shape[1] == 1:
        _log_one_logit()
    if target is None:
        return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    resolved = _integers(target, B, logits.device)
    wrong = resolved[(resolved < 0) | (resolved >= n)]
    if wrong.numel():
        raise ValueError(f"target: expected classes from 0 to {n - 1}, got {wrong.tolist()[:8]}")
    return resolved


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of the target class per image [B]. For a single logit ``z``: ``z`` (class 1) or ``-z`` (class 0)."""
    if logits.shape[1] == 1:
        return torch.where(target == 1, logits[:, 0], -logits[:, 0])
    return logits.gather(1, target[:, None])[:, 0]


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities [B, classes]: the softmax, or ``(1 - sigmoid(z), sigmoid(z))`` for a single logit ``z``."""
    if logits.shape[1] == 1:
        return torch.cat([-logits, logits], dim=1).sigmoid()
    return logits.softmax(-1)


def check_row_by_row(function: TargetFunction, output: Tensor) -> None:
    """Raise ValueError where ``function`` does more than look at each row of ``output`` [B, n] alone.

    Evaluation calls it with rows of many images in any number and order, so it can't hold one value per image.
    """
    value = target_value(function, output, len(output))
    other = torch.cat([output.flip(0), output[:1]])
    try:
        again = target_value(function, other, len(other))
    except Exception as error:  # whatever the user's function raises for another number of rows
        raise ValueError(f"target: expected a function that takes any number of rows, got {error}") from error
    if not torch.allclose(again, torch.cat([value.flip(0), value[:1]]), rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            "target: expected a function of each row of the output alone, got one whose value for an image depends on "
            "the other rows or on their order"
        )


def target_value(function: TargetFunction, output: Any, n_images: int) -> Tensor:
    """``function(output)``, checked to be one value per image: floating [B]."""
    value = function(output)
    if not isinstance(value, Tensor) or list(value.shape) != [n_images] or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"target: expected a function that returns one value per image, [{n_images}], got {got}")
    return value


def _integers(target: Any, B: int, device: torch.device) -> Tensor:
    expected = f"target: expected None, an int, a sequence of ints, a LongTensor [{B}] or a function, got"
    if isinstance(target, bool) or (isinstance(target, Tensor) and (target.is_floating_point() or target.ndim > 1)):
        raise TypeError(f"{expected} {target!r}")
    try:
        resolved = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected} {target!r}") from None
    if resolved.dtype == torch.bool or (resolved.is_floating_point() and resolved.numel()):
        raise TypeError(f"target: expected integers, got {resolved.dtype}")
    if resolved.ndim == 0:
        resolved = resolved.repeat(B)
    if list(resolved.shape) != [B]:
        raise ValueError(f"target: expected one class, or one per image ({B}), got {list(resolved.shape)}")
    return resolved.long()


def _log_one_logit() -> None:
    """Log once that a single logit is read as a sigmoid."""
    global _logged_one_logit
    if not _logged_one_logit:
        log.info("the model has one logit z, read as a sigmoid: class 1 is sigmoid(z), class 0 is 1 - sigmoid(z)")
        _logged_one_logit = True
