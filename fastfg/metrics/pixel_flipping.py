"""Pixel Flipping (Bach et al. 2015), by patches: how fast does the class vanish when the best go first?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Outcome, as_float64, descending
from fastfg.metrics.subjects import Subjects
from fastfg.perturb import running_mean_fill
from fastfg.perturb.fills import Baseline


def area(curve: Tensor) -> Tensor:
    """Area under ``curve`` [..., n] by the trapezoid rule with dx = 1, not normalised: [...], float64.

    >>> import torch
    >>> float(area(torch.tensor([1.0, 0.5, 0.0])))
    1.0
    """
    curve = as_float64(curve)
    if curve.ndim == 0 or curve.shape[-1] < 2:
        raise ValueError(f"curve: expected [..., n] with at least 2 points, got {list(curve.shape)}")
    return torch.trapezoid(curve, dim=-1)


class PixelFlipping(Metric):
    """Patches removed in descending order of attribution until none is left; lower is better.

    Details: ``curve`` [steps + 1], the target's softmax probability after each step, the unperturbed first.

    Args:
        patches_per_step: how many patches each step removes.
    """

    name, title, short = "pixel_flipping", "Pixel Flipping", "PF"
    higher_is_better = False

    def __init__(self, patches_per_step: int = 1, baseline: Baseline = "mean") -> None:
        super().__init__(baseline)
        if patches_per_step < 1:
            raise ValueError(f"pixel_flipping: expected patches_per_step >= 1, got {patches_per_step}")
        self.patches_per_step = patches_per_step

    def start(self, subjects: Subjects, maps: Tensor, image: Tensor) -> Callable[[], Outcome]:
        U, P = maps.shape
        order = descending(maps)
        steps = -(-P // self.patches_per_step)
        rank = order.argsort(dim=-1)
        masks = rank[:, None, :] < torch.arange(1, steps + 1)[:, None] * self.patches_per_step  # [U, steps, P]
        answer = subjects.ask(self._views(subjects, order, image), masks)
        subjects.asked += U * (steps + 1)

        def finish() -> Outcome:
            curve = torch.cat([subjects.unperturbed.prob[image, None], answer().prob], dim=1)
            return area(curve), {"curve": curve}

        return finish

    def _views(self, subjects: Subjects, order: Tensor, image: Tensor) -> Tensor:
        if not (isinstance(self.baseline, str) and self.baseline == "running_mean"):
            return subjects.views(self.baseline, image)
        views = []
        for i, patches in zip(image.tolist(), order.to(subjects.images.device), strict=True):
            fill = running_mean_fill(subjects.images[i], patches, self.patches_per_step, subjects.grid)
            views.append(subjects.add_view(i, fill))
        return torch.tensor(views, dtype=torch.long)
