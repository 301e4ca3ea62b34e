"""SaCo (Wu et al. 2024): do groups of patches with more attribution have more impact?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Outcome, as_float64, descending
from fastfg.metrics.subjects import Subjects
from fastfg.perturb.fills import Baseline

IMPACTS = ("target", "max")


def saco_score(group_attribution: Tensor, impact: Tensor) -> Tensor:
    """``sum(sign * weight) / sum(weight)`` over the pairs of groups: [..., G] twice -> [...], float64, in [-1, 1].

    A pair with ``a_i >= a_j`` weighs ``a_i - a_j``; its sign is + unless ``(d_i - d_j)(a_i - a_j) < 0``. Where
    all weights are 0 the score is 0. A NaN on either side gives NaN.

    >>> import torch
    >>> float(saco_score(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([0.5, 0.1, 0.2])))  # weights 1, 3, 2
    0.3333333333333333
    """
    a, d = as_float64(group_attribution), as_float64(impact)
    if a.shape != d.shape or a.ndim == 0:
        raise ValueError(f"impact: expected {list(a.shape)}, as group_attribution [..., G], got {list(d.shape)}")
    i, j = torch.triu_indices(a.shape[-1], a.shape[-1], offset=1, device=a.device)
    attribution, effect = a[..., i] - a[..., j], d[..., i] - d[..., j]
    weight = attribution.abs()
    signed = torch.where(effect * attribution < 0, -weight, weight).sum(-1)
    total = weight.sum(-1)
    score = torch.where(total == 0, 0.0, signed / torch.where(total == 0, 1.0, total))
    undefined = a.isnan().any(-1) | d.isnan().any(-1)
    return torch.where(undefined, torch.nan, score)


class SaCo(Metric):
    """Patches sorted by attribution, split into ``n_bins`` groups, each group removed alone.

    Details: ``group_attribution`` [n_bins], ``impact`` [n_bins] = ``p(y|x) - p(y|x without the group)``.

    Args:
        n_bins: None is ``ceil(P / 4)``. impact: ``target`` follows the original class; ``max`` takes the perturbed
            image's largest probability, whatever its class (the author's program).
    """

    name, title, short = "saco", "SaCo", "SaCo"
    higher_is_better = True

    def __init__(self, n_bins: int | None = None, impact: str = "target", baseline: Baseline = "mean") -> None:
        super().__init__(baseline)
        if impact not in IMPACTS:
            raise ValueError(f"saco: expected impact to be one of {IMPACTS}, got {impact!r}")
        self.n_bins, self.impact = n_bins, impact

    def start(self, subjects: Subjects, maps: Tensor, image: Tensor) -> Callable[[], Outcome]:
        U, P = maps.shape
        n_bins = math.ceil(P / 4) if self.n_bins is None else self.n_bins
        if not 2 <= n_bins <= P:
            raise ValueError(f"saco: expected n_bins from 2 to {P} patches, got {n_bins}")
        group = torch.empty(U, P, dtype=torch.long).scatter_(1, descending(maps), group_of_rank(P, n_bins).expand(U, P))
        attribution = torch.zeros(U, n_bins, dtype=torch.float64).scatter_add_(1, group, maps)
        masks = group[:, None, :] == torch.arange(n_bins)[:, None]  # [U, n_bins, P]
        answer = subjects.ask(subjects.views(self.baseline, image), masks)
        subjects.asked += U * (n_bins + 1)

        def finish() -> Outcome:
            readings = answer()
            left = readings.prob if self.impact == "target" else readings.max_prob
            impact = subjects.unperturbed.prob[image, None] - left
            return saco_score(attribution, impact), {"group_attribution": attribution, "impact": impact}

        return finish


def group_of_rank(n_patches: int, n_bins: int) -> Tensor:
    """NumPy's ``array_split`` of the sorted patches: the group of each rank [P]; the first groups are larger."""
    size, larger = divmod(n_patches, n_bins)
    sizes = torch.full((n_bins,), size)
    sizes[:larger] += 1
    return torch.arange(n_bins).repeat_interleave(sizes)
