"""The masks of all metrics, each of which is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastfg.metrics.metric import Metric, Plan
from fastfg.metrics.planning import Planned
from fastfg.metrics.subjects import Images
from fastfg.perturb import Engine, Fill, Readings, View, running_mean_fill, to_device
from fastfg.perturb.fills import is_named
from fastfg.targets import Target


class Questions:
    """Collects the masks of all metrics, and reads each distinct mask of a view once."""

    def __init__(self, subjects: Images) -> None:
        self.subjects = subjects
        self.views: list[View] = []
        self.image_of: list[int] = []  # the image of each view
        self._fills: dict[object, int] = {}  # views that metrics share, by image and baseline
        self._view: list[Tensor] = []  # the view of each requested mask
        self._masks: list[Tensor] = []
        self._asked = 0

    def ask(self, planned: Sequence[Planned], rows: slice) -> list[Tensor]:
        """Add the masks of all plans. Returns the positions [n, m] of each plan's among all requested masks."""
        views: list[list[int]] = [[] for _ in planned]
        for image in range(rows.start, rows.stop):  # views in the order of images
            for p, own in zip(planned, views, strict=True):
                if image in p.spans:
                    own += self._views_of(image, p.metric, p.plan, p.spans[image])
        return [self._add_masks(p.plan.masks, own) for p, own in zip(planned, views, strict=True)]

    def read(
        self,
        engine: Engine,
        target: Target,
        rows: slice,
        progress: Callable[[int, int], None] | None,
    ) -> Callable[[], Readings]:
        """Start the forwards. Returns the function that waits for the readings of all requested masks, on the CPU."""
        images = self.subjects.images
        total = len(images)
        if not self._view:
            if progress is not None:
                progress(rows.stop, total)
            return lambda: Readings.empty(0, torch.device("cpu"))
        view, masks = torch.cat(self._view), torch.cat(self._masks)
        chosen, row = _each_once(view, masks)
        image = torch.tensor(self.image_of, device="cpu")[view[chosen]]  # the image of each mask, ascending

        def tell(done: int) -> None:
            """Report progress: an image is done when its last mask is."""
            if progress is not None:
                progress(int(image[done]) if done < len(image) else rows.stop, total)

        of_images = target[to_device(image, images.device)]
        arrive = engine.read(self.views, view[chosen], masks[chosen], of_images, tell).on_the_way()
        return lambda: arrive()[row]

    def _add_masks(self, masks: Tensor, views: list[int]) -> Tensor:
        """Add ``masks`` [n, m, P], of one view per row. Returns their positions [n, m]."""
        n, m, P = masks.shape
        self._view.append(torch.tensor(views, dtype=torch.long, device="cpu").repeat_interleave(m))
        self._masks.append(masks.reshape(n * m, P))
        places = torch.arange(self._asked, self._asked + n * m, device="cpu").reshape(n, m)
        self._asked += n * m
        return places

    def _views_of(self, image: int, metric: Metric, plan: Plan, span: slice) -> list[int]:
        """One view per map of an image, which are the rows ``span`` of the plan."""
        baseline = metric.baseline
        if is_named(baseline, "running_mean") and plan.order is not None:
            subject, grid = self.subjects.images[image], self.subjects.grid
            orders = plan.order[span].to(subject.device)
            fills = [running_mean_fill(subject, order, plan.patches_per_step, grid) for order in orders]
            return [self._add(image, fill) for fill in fills]
        assert baseline is not None  # choose_metrics
        key = (image, tuple(baseline.flatten().tolist()) if isinstance(baseline, Tensor) else baseline)
        if key not in self._fills:
            self._fills[key] = self._add(image, self.subjects.fill(image, baseline))
        return [self._fills[key]] * (span.stop - span.start)

    def _add(self, image: int, fill: Fill) -> int:
        self.views.append(View(self.subjects.images[image], fill))
        self.image_of.append(image)
        return len(self.views) - 1


def _each_once(view: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct masks, ordered by view; and for each requested mask, its row among the distinct ones."""
    order = view.argsort(stable=True).numpy()
    keys = np.concatenate([view.numpy()[:, None].view(np.uint8), np.packbits(masks.numpy(), axis=1)], axis=1)[order]
    whole = np.ascontiguousarray(keys).view(np.dtype((np.void, keys.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    as_asked = first.argsort()  # unique sorts by content
    place, rows = np.empty_like(as_asked), np.empty_like(order)
    place[as_asked] = np.arange(len(as_asked))
    rows[order] = place[inverse]
    return torch.from_numpy(order[first[as_asked]]), torch.from_numpy(rows)
