"""Add to a report where the scores of some images' patches come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastfg.models import Adapter
from fastfg.report.contents import Contents
from fastfg.report.names import Names
from fastfg.sae.model import SparseAutoencoder
from fastfg.study.evidence import ablate, patch_evidence, strongest_features
from fastfg.study.feature_evidence import LabelledBatch, feature_evidence
from fastfg.types import Gate

BATCH = 4
MOST_FEATURES = 240  # whose histogram and patches fit into the page


def both_ends(contents: Contents, n: int = 24) -> list[str]:
    """The keys of the ``n`` images that gained most and lost most, in the order of the gallery.

    The gain is in the first metric, between the two variants whose maps are compared. All images if they are no more
    than ``n``, or if there is no such gain.
    """
    names = Names(contents)
    keys = [image.key for image in contents.images]
    if len(keys) <= n or names.pair is None or not names.metrics:
        return keys[:n]
    metric = names.metrics[0]
    rows = contents.scores.drop_duplicates([contents.key, "variant"])
    wide = rows.pivot(index=contents.key, columns="variant", values=metric)
    gain = (
        (wide[names.pair[1]] - wide[names.pair[0]]) * (-1 if names.higher_is_better(metric) is False else 1)
    ).dropna()
    order = sorted((key for key in keys if key in gain.index), key=lambda key: -float(gain[key]))
    return order if len(order) <= n else order[: n - n // 2] + order[len(order) - n // 2 :]


def add_evidence(
    contents: Contents,
    model: nn.Module | Adapter,
    images: Mapping[str, Tensor],
    gate: Gate,
    saes: Mapping[int, SparseAutoencoder],
    batches: Iterable[LabelledBatch] = (),
    *,
    targets: Mapping[str, int] | None = None,
    of: str = "",
    n: int = 8,
    most_features: int = MOST_FEATURES,
    per_block: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Contents:
    """``contents`` with the evidence of some of its images.

    Args:
        contents: with images. model, gate, saes: those that made the maps of the variant ``of``.
        images: {key: the model's input [C, H, W]} of the images to explain, as :func:`both_ends` chooses them.
        batches: images to look for what features respond to, such as the training images.
        targets: {key: the explained class}; None: the predicted ones.
        n: contributions per patch. most_features: features with a histogram and patches of their own.
        per_block: features that are taken out, per image and block.
        progress: called with (images done, images of ``images``) while features are taken out.

    Raises ValueError for keys that the report does not have, and for a gate that is a control.
    """
    known = {image.key for image in contents.images}
    unknown = [key for key in images if key not in known]
    if unknown:
        raise ValueError(f"images: expected keys of images of the report, got {unknown[:3]}")
    keys, tensors = list(images), torch.stack(list(images.values()))
    classes = None if targets is None else [targets[key] for key in keys]
    found = []
    for first in range(0, len(keys), BATCH):
        part = slice(first, first + BATCH)
        target = None if classes is None else torch.tensor(classes[part], device=tensors.device)
        found += patch_evidence(model, tensors[part], gate, saes, target=target, n=n)
    table = ablate(model, tensors, keys, found, gate, saes, per_block=per_block, progress=progress)
    features = feature_evidence(model, batches, saes, strongest_features(found, most_features))
    explained = dict(zip(keys, found, strict=True))
    shown = [
        replace(image, evidence={block: terms.evidence for block, terms in explained[image.key].blocks.items()})
        if image.key in explained
        else image
        for image in contents.images
    ]
    seen = {name: one for name, one in features.items() if one.n_patches}
    return replace(contents, images=shown, features=seen, ablations=table, evidence_of=of)
