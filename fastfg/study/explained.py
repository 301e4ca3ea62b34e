"""The evidence behind some images of a study's report: features per patch, what they respond to, and ablations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch

from fastfg.data import batches
from fastfg.report.contents import FeatureEvidence, ImageEntry
from fastfg.study.claim import GATE, VANILLA
from fastfg.study.evidence import ImageTerms, ablate, patch_evidence, strongest_features
from fastfg.study.feature_evidence import LabelledBatch, feature_evidence
from fastfg.study.judging import Judging
from fastfg.study.measures import PRIMARY
from fastfg.study.protocol import Outcome
from fastfg.study.variants import TRAINED

if TYPE_CHECKING:
    from torch import Tensor

EXPLAINED = 12  # images with evidence: those that gained most by the gate, and those that lost most
FEATURES = 60  # that are described
SEEN = 300  # images that features are described on
BATCH = 8
Track = Callable[[str], Callable[[int, int], None]]


class Explained(NamedTuple):
    """The images, some of them with evidence, the features in it, and what happens when features are taken out."""

    images: list[ImageEntry]
    features: dict[tuple[int, int], FeatureEvidence]
    ablations: pd.DataFrame


def explained(judging: Judging, outcome: Outcome, entries: Sequence[ImageEntry], track: Track) -> Explained:
    """Add the evidence to the images of ``entries`` that the gate changed most."""
    chosen = _most_changed(outcome, [entry.key for entry in entries])
    found: dict[str, ImageTerms] = {}
    parts, gate, saes = judging.parts, outcome.choice.gate, judging.parts.saes[TRAINED]
    tables, progress = [], track(f"Evidence of {len(chosen)} images")
    for images, keys, _ in _read(judging, chosen, 1):
        terms = patch_evidence(parts.model, images, gate, saes, target=judging.target_of(keys))
        tables.append(ablate(parts.model, images, keys, terms, gate, saes))
        found |= zip(keys, terms, strict=True)
        progress(len(found), len(chosen))
    features = _features(judging, found, track)
    shown = [
        replace(entry, evidence={block: terms.evidence for block, terms in found[entry.key].blocks.items()})
        if entry.key in found
        else entry
        for entry in entries
    ]
    return Explained(shown, features, pd.concat(tables, ignore_index=True))


def _most_changed(outcome: Outcome, keys: Sequence[str]) -> list[str]:
    """The images among ``keys`` that the gate helped most and harmed most in the primary score."""
    table = next(iter(outcome.tests.values())).pivot(index="image", columns="variant", values=PRIMARY)
    gain = (table[GATE] - table[VANILLA]).dropna()
    order = gain[gain.index.isin(keys)].sort_values(kind="stable").index.tolist()
    half = min(EXPLAINED // 2, len(order) // 2)
    return order[:half] + order[len(order) - half :] if half else order


def _features(judging: Judging, found: dict[str, ImageTerms], track: Track) -> dict[tuple[int, int], FeatureEvidence]:
    """What the strongest features respond to, over validation images: the test images are not looked at for it."""
    keys = judging.parts.validation[:SEEN]
    progress = track(f"Features on {len(keys)} validation images")
    return feature_evidence(
        judging.parts.model,
        (LabelledBatch(*batch) for batch in _read(judging, keys, BATCH)),
        judging.parts.saes[TRAINED],
        strongest_features(found.values(), FEATURES),
        progress=lambda done: progress(done, len(keys)),
    )


def _read(judging: Judging, keys: Sequence[str], size: int) -> Iterator[tuple[Tensor, list[str], list[str | None]]]:
    """The images that can be read, on the device, with their keys and labels."""
    rows = judging.parts.images.loc[list(keys)]
    by_path = rows.set_index("path", drop=False)
    device: torch.device = judging.parts.model.parameter.device
    for batch in batches([Path(path) for path in rows["path"]], judging.parts.transform, size):
        if batch.paths:
            own = by_path.loc[[str(path) for path in batch.paths]]
            yield batch.images.to(device), list(own["key"]), [label or None for label in own["label"]]
