"""What comes of a metric on an image: scores, details, and the reasons for missing scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric


@dataclass
class Outcome:
    """One metric on one image: scores [C], details [C, ...], and per map the reason for a missing score, or None."""

    scores: Tensor
    details: dict[str, Tensor]
    reasons: list[str | None]


@dataclass
class Verdict:
    """All metrics on one image. ``asked`` counts the forwards if no metric and no map shared any."""

    outcomes: dict[str, Outcome]
    asked: int


def no_outcome(reasons: list[str | None]) -> Outcome:
    """The outcome for an image that has no usable map."""
    return Outcome(torch.full((len(reasons),), torch.nan, dtype=torch.float64, device="cpu"), {}, reasons)


def outcome_of(
    scores: Tensor, details: dict[str, Tensor], found: Sequence[str | None], reasons: Sequence[str | None]
) -> Outcome:
    """The outcome [C] from the scores and details of the U usable maps.

    ``found`` says per usable map why its score is missing, and ``reasons`` per map why it is not usable.
    """
    if any(found):
        scores = torch.where(torch.tensor([reason is None for reason in found], device="cpu"), scores, torch.nan)
    if not any(reasons):
        return Outcome(scores, details, list(found))
    judged = torch.tensor([reason is None for reason in reasons], device="cpu")
    rest = iter(found)
    why = [next(rest) if reason is None else reason for reason in reasons]
    return Outcome(_spread(scores, judged), {name: _spread(t, judged) for name, t in details.items()}, why)


def checked_scores(
    metric: Metric, U: int, scores: Tensor, details: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Float64 scores [U] and details, each [U, ...]. Raises ValueError for other shapes."""
    if not isinstance(scores, Tensor) or list(scores.shape) != [U]:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{metric.name}: expected scores [{U}], one per map, got {got}")
    for name, values in details.items():
        if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != U:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{metric.name}: expected details[{name!r}] [{U}, ...], one per map, got {got}")
    return scores.double(), details


def _spread(values: Tensor, used: Tensor) -> Tensor:
    """``values`` [U, ...] at the positions of the ``used`` maps: [C, ...], elsewhere NaN (-1 for integers)."""
    everywhere = torch.full((len(used), *values.shape[1:]), missing_value(values), dtype=values.dtype, device="cpu")
    everywhere[used] = values
    return everywhere


def missing_value(like: Tensor) -> float:
    """The value for a missing detail: NaN, or -1 for integers."""
    return torch.nan if like.is_floating_point() else -1
