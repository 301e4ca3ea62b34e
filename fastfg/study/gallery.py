"""The images of a study's report: pictures, maps, classes and probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastfg.report.contents import ImageEntry
from fastfg.report.overlay import displayed
from fastfg.study.claim import GATE, VANILLA, Judgement
from fastfg.study.judging import Judging
from fastfg.study.prepared import read_rows
from fastfg.study.protocol import Outcome
from fastfg.study.telling import Track
from fastfg.study.variants import explain
from fastfg.targets import probabilities

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 300  # images in the report
BATCH = 8


def with_maps(outcome: Outcome, judged: Judgement) -> list[str]:
    """The variants whose maps are shown: vanilla, the gate, its strongest control, and the first shuffled decoder.

    If the mean of the shuffled decoders is the strongest control, which has no map, it is the strongest of the others.
    """
    gain = judged.against_gate.set_index("variant")["difference"]  # a control's score less the gate's
    controls = gain[gain.index.isin(outcome.controls)].dropna()
    strongest = [str(controls.idxmax())] if len(controls) else []
    return [VANILLA, GATE, *strongest, *outcome.shuffled[:1]]


def gallery(judging: Judging, outcome: Outcome, names: Sequence[str], track: Track) -> list[ImageEntry]:
    """The first :data:`LARGEST` test images that can be read, with the maps of the variants ``names``."""
    images = judging.parts.images.loc[judging.parts.test[:LARGEST]]
    shown = [variant for variant in outcome.variants if variant.name in names]
    progress, found, done = track(f"Pictures of {len(images)} images"), [], 0
    for batch, rows in read_rows(images, judging.parts.transform, BATCH):
        if batch.paths:
            found += _entries(judging, rows, batch.images, shown)
        done += len(batch.paths) + len(batch.errors)
        progress(done, len(images))
    return found


def _entries(judging: Judging, rows: pd.DataFrame, images: torch.Tensor, variants: list[Any]) -> list[ImageEntry]:
    parts = judging.parts
    device = parts.model.parameter.device
    keys = list(rows["key"])
    target = judging.target_of(keys)
    maps, found = explain(
        parts.model, images.to(device), variants, parts.saes, target=target, keys=keys, seed=judging.config.run.seed
    )
    probability = probabilities(found.logits)
    entries = []
    for i, row in enumerate(rows.to_dict("records")):
        picture = displayed(images[i], parts.model.pixel_mean, parts.model.pixel_std)
        predicted, explained = int(probability[i].argmax()), int(found.target[i])
        entries.append(
            ImageEntry(
                key=row["key"],
                picture=(picture.numpy() * 255).round().astype(np.uint8),
                maps={variant.name: maps[c, i].cpu().numpy() for c, variant in enumerate(variants)},
                label=row["label"] or None,
                predicted=_name(parts.classes, predicted),
                probability=float(probability[i, predicted]),
                explained=_name(parts.classes, explained),
                group=row["group"] or None,
                path=row["path"],
            )
        )
    return entries


def _name(classes: tuple[str, ...], number: int) -> str:
    return classes[number] if classes else f"class {number}"
