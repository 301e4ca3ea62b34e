"""What features respond to: one pass over many images gives density, histogram, class lift and strongest patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastfg.attribution.residuals import residuals
from fastfg.checks import check_saes
from fastfg.models import Adapter, adapt
from fastfg.perturb.masks import PatchGrid
from fastfg.report.contents import Crop, FeatureEvidence
from fastfg.report.overlay import displayed
from fastfg.sae.model import SparseAutoencoder

Array = np.ndarray[Any, Any]
BINS = 24
CONTEXT = 2  # patches around the one that a crop shows


class LabelledBatch(NamedTuple):
    """Images [B, C, H, W] with their keys and classes (None: not known), and the names of their files, if given."""

    images: Tensor
    keys: Sequence[str]
    labels: Sequence[str | None]
    names: Sequence[str] = ()


def feature_evidence(
    model: nn.Module | Adapter,
    batches: Iterable[LabelledBatch],
    saes: Mapping[int, SparseAutoencoder],
    features: Mapping[int, Sequence[int]],
    *,
    crops: int = 5,
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[int, int], FeatureEvidence]:
    """What each of ``features`` {block: features} responds to, over all patches of the images.

    A feature is active at a patch where its code is not 0; the histogram is of the magnitude of its codes there. Its
    lift for a class is the class's share of the feature's summed magnitudes over the class's share of the patches: 1
    where the feature does not tell the class. Images without a label do not count for the lift.

    Args:
        model: of a known family. batches: the images in any order, such as the training images.
        saes: {block: SAE}.
        crops: strongest patches to keep per feature, at most one per image. Of equal ones, the first is kept.
        progress: called with the number of images done.

    Memory does not grow with the number of images.
    """
    adapter = adapt(model)
    wanted = {block: list(chosen) for block, chosen in features.items() if chosen}
    check_saes(saes, sorted(wanted), adapter.parameter.device)
    seen = {block: _Seen(len(chosen), crops) for block, chosen in wanted.items()}
    done = 0
    for batch in batches:
        streams = residuals(adapter, batch.images, sorted(wanted))
        pictures = _Pictures(adapter, batch)
        for block, chosen in wanted.items():
            for i, x in enumerate(streams[block]):
                codes = saes[block].encode(x)[:, chosen].abs().double().cpu().numpy()
                seen[block].add(codes, batch.labels[i], partial(pictures.crop, i))
        done += len(batch.images)
        if progress is not None:
            progress(done)
    return {
        (block, feature): seen[block].evidence(k, done)
        for block, chosen in wanted.items()
        for k, feature in enumerate(chosen)
    }


class Histogram:
    """Counts of positive numbers in bins of equal width from 0. The range doubles when a larger number comes.

    Two neighbouring bins then become one, so no number is counted wrong.

    >>> histogram = Histogram(4)
    >>> histogram.add(np.array([0.5, 1.0, 3.0]))
    >>> histogram.counts.tolist(), histogram.edges.tolist()
    ([1, 1, 0, 1], [0.0, 1.0, 2.0, 3.0, 4.0])
    >>> histogram.add(np.array([7.0]))
    >>> histogram.counts.tolist(), histogram.top
    ([2, 1, 0, 1], 8.0)
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins, np.int64)
        self.top = 0.0

    def add(self, values: Array) -> None:
        """Count ``values``, all above 0."""
        if not len(values):
            return
        largest = float(values.max())
        if self.top == 0.0:
            self.top = float(2.0 ** np.ceil(np.log2(largest)))
        while largest > self.top:
            self.top *= 2
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([half, np.zeros_like(half)])
        bins = len(self.counts)
        self.counts += np.bincount(np.minimum((values / self.top * bins).astype(int), bins - 1), minlength=bins)

    @property
    def edges(self) -> Array:
        """The edges of the bins, [bins + 1]."""
        return np.linspace(0.0, self.top, len(self.counts) + 1)


class _Seen:
    """What was seen of the features of one block, so far."""

    def __init__(self, n: int, crops: int) -> None:
        self.active, self.patches = np.zeros(n, np.int64), 0
        self.histograms = [Histogram() for _ in range(n)]
        self.mass: dict[str, Array] = {}  # {class: [n]}
        self.of_class: dict[str, int] = {}  # patches
        self.best: list[list[Crop]] = [[] for _ in range(n)]
        self.crops = crops

    def add(self, codes: Array, label: str | None, crop: Callable[[int, float], Crop]) -> None:
        """Add the codes [P, n] of one image."""
        self.active += (codes > 0).sum(0)
        self.patches += len(codes)
        if label is not None:
            self.mass[label] = self.mass.get(label, 0.0) + codes.sum(0)
            self.of_class[label] = self.of_class.get(label, 0) + len(codes)
        for k in np.flatnonzero((codes > 0).any(0)):
            own = codes[:, k]
            self.histograms[k].add(own[own > 0])
            patch, best = int(own.argmax()), self.best[k]
            if self.crops and (len(best) < self.crops or own[patch] > best[-1].activation):
                best.append(crop(patch, float(own[patch])))
                best.sort(key=lambda one: -one.activation)  # stable: of equal ones, the first stays
                del best[self.crops :]

    def evidence(self, k: int, n_images: int) -> FeatureEvidence:
        histogram = self.histograms[k]
        total = sum(float(mass[k]) for mass in self.mass.values())
        patches = sum(self.of_class.values())
        lift = {
            label: float(self.mass[label][k]) / total / (self.of_class[label] / patches)
            for label in sorted(self.mass)
            if total and len(self.mass) > 1  # with one class, each lift is 1
        }
        there = histogram.top > 0
        return FeatureEvidence(
            density=float(self.active[k]) / self.patches if self.patches else float("nan"),
            n_patches=self.patches,
            n_images=n_images,
            counts=histogram.counts if there else np.zeros(0, np.int64),
            edges=histogram.edges if there else np.zeros(0),
            lift=lift,
            crops=self.best[k],
        )


class _Pictures:
    """Cuts patches out of the images of a batch."""

    def __init__(self, adapter: Adapter, batch: LabelledBatch) -> None:
        images = batch.images
        size = (images.shape[-2], images.shape[-1])
        self.grid = PatchGrid.of(size, adapter.patches(images), adapter.patch_size)
        self.adapter, self.batch = adapter, batch
        self.shown: dict[int, Tensor] = {}

    def crop(self, i: int, patch: int, value: float) -> Crop:
        """The patch with :data:`CONTEXT` patches around it, as far as the image goes."""
        image = self.batch.images[i]
        ph, pw = self.adapter.patch_size or (image.shape[-2] // self.grid.gh, image.shape[-1] // self.grid.gw)
        y, x = patch // self.grid.gw * ph, patch % self.grid.gw * pw
        top, left = max(y - CONTEXT * ph, 0), max(x - CONTEXT * pw, 0)
        if i not in self.shown:
            self.shown[i] = displayed(image, self.adapter.pixel_mean, self.adapter.pixel_std)
        cut = self.shown[i][top : y + (CONTEXT + 1) * ph, left : x + (CONTEXT + 1) * pw]
        pixels = (cut * 255).round().to(torch.uint8).numpy()
        box = (x - left, y - top, pw, ph)
        name = self.batch.names[i] if self.batch.names else ""
        return Crop(pixels, str(self.batch.keys[i]), value, box, self.batch.labels[i] or "", name)
