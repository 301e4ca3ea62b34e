"""Faithfulness Correlation (Bhatt et al. 2020): does a subset's attribution foretell the drop of the logit?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Outcome, as_float64
from fastfg.metrics.subjects import Subjects
from fastfg.perturb import generator
from fastfg.perturb.fills import Baseline

KINDS = ("spearman", "pearson")
FLAT = 1e-10  # a standard deviation below this counts as no variation


def correlation(a: Tensor, b: Tensor, kind: str = "spearman") -> Tensor:
    """Correlation over the last dimension: [..., n] twice -> [...], float64.

    ``spearman`` (average ranks on ties) or ``pearson``. Where either side's standard deviation is below 1e-10
    it is 0. A NaN on either side gives NaN.

    >>> import torch
    >>> float(correlation(torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 3.0, 9.0])))
    1.0
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    a, b = as_float64(a), as_float64(b)
    if a.shape[-1:] != b.shape[-1:] or a.ndim == 0:
        raise ValueError(f"b: expected [..., {list(a.shape)[-1:]}], as a, got {list(b.shape)}")
    flat = (a.std(-1, correction=0) < FLAT) | (b.std(-1, correction=0) < FLAT)
    undefined = a.isnan().any(-1) | b.isnan().any(-1)
    x, y = (ranks(a), ranks(b)) if kind == "spearman" else (a, b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    norm = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    result = (x * y).sum(-1) / torch.where(flat, 1.0, norm)
    result = torch.where(flat, 0.0, result.clamp(-1, 1))
    return torch.where(undefined, torch.nan, result)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 over the last dimension, equal values sharing their average rank."""
    this, others = values.unsqueeze(-1), values.unsqueeze(-2)
    return (this > others).sum(-1) + ((this == others).sum(-1).double() + 1) / 2


class FaithfulnessCorrelation(Metric):
    """Random subsets removed; correlation of their summed attribution with the drop of the target's logit.

    The subsets do not depend on the attribution, so several maps of one image share their forwards.

    Details: ``drop`` [n_trials, n_runs], ``subsets`` [n_trials, n_runs, subset_size] (the same for every map).

    Args:
        n_runs: subsets a trial. n_trials: averaged. subset_size: patches a subset; None is 20 where P >= 100, else
            ``max(2, round(P / 5))``. correlation: ``spearman`` or ``pearson``.
        subsets: [n_trials, n_runs, B, subset_size] patch indices, in place of drawn ones.
    """

    name, title, short = "faithfulness_correlation", "Faithfulness Correlation", "FC"
    higher_is_better = True

    def __init__(
        self,
        n_runs: int = 20,
        n_trials: int = 3,
        subset_size: int | None = None,
        correlation: str = "spearman",
        subsets: Tensor | None = None,
        baseline: Baseline = "mean",
    ) -> None:
        super().__init__(baseline)
        if correlation not in KINDS:
            raise ValueError(f"faithfulness_correlation: expected correlation in {KINDS}, got {correlation!r}")
        if n_runs < 2 or n_trials < 1:
            raise ValueError(
                f"faithfulness_correlation: expected n_runs >= 2 and n_trials >= 1, got {n_runs} and {n_trials}"
            )
        self.n_runs, self.n_trials, self.subset_size, self.kind = n_runs, n_trials, subset_size, correlation
        self.subsets = None if subsets is None else torch.as_tensor(subsets)

    def start(self, subjects: Subjects, maps: Tensor, image: Tensor) -> Callable[[], Outcome]:
        U, P = maps.shape
        judged, of = image.unique(return_inverse=True)
        drawn = [self._subsets(subjects, int(i), P) for i in judged]
        subsets = torch.stack(drawn) if drawn else torch.empty(0, 1, 2, 1, dtype=torch.long)  # [n, trials, runs, size]
        n_trials, n_runs = subsets.shape[1:3]
        masks = torch.zeros(len(judged), n_trials * n_runs, P, dtype=torch.bool).scatter_(
            2, subsets.flatten(1, 2), True
        )
        answer = subjects.ask(subjects.views(self.baseline, judged), masks)
        subjects.asked += U * n_trials * (n_runs + 1)

        def finish() -> Outcome:
            drop = subjects.unperturbed.logit[judged, None] - answer().logit
            drop = drop.reshape(-1, n_trials, n_runs)[of]
            summed = maps.gather(1, subsets[of].flatten(1)).reshape(U, n_trials, n_runs, -1).sum(-1)
            score = correlation(summed, drop, self.kind).mean(-1)
            return score, {"drop": drop, "subsets": subsets[of]}

        return finish

    def _subsets(self, subjects: Subjects, image: int, P: int) -> Tensor:
        if self.subsets is None:
            size = default_subset_size(P) if self.subset_size is None else self.subset_size
            if not 1 <= size <= P:
                raise ValueError(f"faithfulness_correlation: expected subset_size from 1 to {P}, got {size}")
            random = generator(subjects.seed, subjects.keys[image], self.name)
            return draw_subsets(P, self.n_trials, self.n_runs, size, random)
        given, index = self.subsets, subjects.first + image
        if given.ndim != 4 or given.is_floating_point() or index >= given.shape[2]:
            raise ValueError(
                "faithfulness_correlation: expected subsets [n_trials, n_runs, B, subset_size] of patch indices, got "
                f"{given.dtype} {list(given.shape)}"
            )
        if given.numel() and (int(given.min()) < 0 or int(given.max()) >= P):
            raise ValueError(
                f"faithfulness_correlation: expected subsets of patches 0 to {P - 1}, got {int(given.min())} to "
                f"{int(given.max())}"
            )
        return given[:, :, index].long().cpu()


def default_subset_size(n_patches: int) -> int:
    """Patches in a subset: 20, or a fifth of a small grid's."""
    return 20 if n_patches >= 100 else max(2, round(n_patches / 5))


def draw_subsets(n_patches: int, n_trials: int, n_runs: int, size: int, random: torch.Generator) -> Tensor:
    """Subsets [n_trials, n_runs, size] of patches, each drawn without replacement."""
    chance = torch.rand(n_trials, n_runs, n_patches, generator=random, dtype=torch.float64)
    return chance.argsort(dim=-1, stable=True)[..., :size]
