"""The evidence behind some images of a study's report: features per patch, what they respond to, and ablations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastfg.report.contents import Contents, file_of
from fastfg.study.add_evidence import add_evidence, both_ends
from fastfg.study.claim import GATE
from fastfg.study.feature_evidence import LabelledBatch
from fastfg.study.judging import Judging
from fastfg.study.prepared import read_rows
from fastfg.study.protocol import Outcome
from fastfg.study.telling import Track
from fastfg.study.variants import TRAINED

EXPLAINED = 24  # images with evidence: those that gained most by the gate, and those that lost most
SEEN = 300  # images that features are described on
BATCH = 8


def with_evidence(judging: Judging, outcome: Outcome, made: Contents, track: Track) -> Contents:
    """The report with the evidence of the images that the gate changed most.

    What features respond to is shown on validation images: the test images are not looked at for it.
    """
    keys = both_ends(made, EXPLAINED)
    if not keys:
        return made
    images = {key: image for part in _read(judging, keys) for key, image in zip(part.keys, part.images, strict=True)}
    targets = judging.target_of(list(images))
    shown = judging.parts.validation[:SEEN]
    return add_evidence(
        made,
        judging.parts.model,
        images,
        outcome.choice.gate,
        judging.parts.saes[TRAINED],
        _read(judging, shown),
        targets=None if targets is None else dict(zip(images, targets.tolist(), strict=True)),
        of=GATE,
        progress=track(f"Evidence of {len(images)} images"),
    )


def _read(judging: Judging, keys: Sequence[str]) -> Iterator[LabelledBatch]:
    """The images that can be read, on the model's device."""
    rows = judging.parts.images.loc[list(keys)]
    device = judging.parts.model.parameter.device
    for batch, own in read_rows(rows, judging.parts.transform, BATCH):
        if batch.paths:
            labels, names = [label or None for label in own["label"]], [file_of(path) for path in own["path"]]
            yield LabelledBatch(batch.images.to(device), list(own["key"]), labels, names)
