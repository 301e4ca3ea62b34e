"""Judge variants on the images of a study, unit by unit, in as many processes as there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastfg.data.manifest import content_hash, with_own_groups
from fastfg.metrics.choose import METRICS, WITHOUT_MASKS
from fastfg.study.config import Config
from fastfg.study.measures import Measure, judge, patches_per_step, wide
from fastfg.study.prepare import Parts
from fastfg.study.prepared import read_rows
from fastfg.study.shards import Failure, Unit, Work
from fastfg.study.store import Store
from fastfg.study.telling import Track
from fastfg.study.units import run_units
from fastfg.study.variants import Variant, explain

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {"target": "int64", "score": "float64", "error": "string"}


@dataclass
class Judging:
    """The scores of a study's images. Scores that the folder already holds are not computed again.

    Attributes:
        forwards: perturbed forwards that this process has run.
    """

    config: Config
    parts: Parts
    store: Store
    track: Track
    forwards: int = 0

    def scores(
        self, title: str, split: str, variants: Sequence[Variant], measures: Sequence[Measure], limit: int | None = None
    ) -> pd.DataFrame:
        """The scores of one mode or several: :func:`fastfg.study.measures.wide` of the rows of these measures.

        Args:
            split: ``validation`` or ``test``. limit: how many of its images, at least; whole units are judged.

        Returns the rows of the store. All processes get the same ones: the call returns when all units are complete.
        """
        units = self.units(split, limit)
        by_identity = self._by_identity(variants)
        by_measure = {measure.identity: measure for measure in measures}
        progress = self.track(title)

        def do(unit: Unit, work: Work) -> tuple[Any, list[Failure]]:
            own = [by_identity[name] for name in work.variants]
            return self._judge(unit, own, [by_measure[name] for name in work.measures])

        run_units(
            self.store,
            units,
            Work(tuple(by_identity), tuple(by_measure)),
            do,
            progress=lambda at: progress(at.done, at.total),
            max_failures=self._max_failures(split, units),
        )
        found = self.store.read(units=[u.name for u in units], variants=by_identity, measures=by_measure).to_pandas()
        if not len(found):
            n = sum(len(unit.keys) for unit in units)
            raise ValueError(
                f"data.manifest: expected {split} images that can be read, got none of {n} (see errors.parquet)"
            )
        return found

    def table(self, rows: pd.DataFrame, variants: Sequence[Variant], measures: Sequence[Measure]) -> pd.DataFrame:
        """``rows`` of one mode as a table like that of :func:`fastfg.compare`, with groups if some are known."""
        table = wide(rows, {self.identity(variant): variant.name for variant in variants}, measures)
        groups = with_own_groups(self.parts.images.loc[table["image"], "group"].to_dict())
        if self.config.data.by_group and groups is not None:
            table.insert(1, "group", table["image"].map(groups))
        return table

    @property
    def patches_per_step(self) -> int:
        """Of the curves: ``test.steps`` of them remove all patches."""
        return patches_per_step(self.parts.n_patches, self.config.test.steps)

    def _by_identity(self, variants: Sequence[Variant]) -> dict[str, Variant]:
        found: dict[str, Variant] = {}
        for variant in variants:
            other = found.setdefault(self.identity(variant), variant)
            if other is not variant:
                raise ValueError(
                    f"{variant.name}: expected other maps than {other.name!r}, got the same gate with the same SAEs"
                )
        return found

    def _max_failures(self, split: str, units: Sequence[Unit]) -> float:
        """The share of the images of ``units`` that may fail, as that of the whole split is given."""
        n, whole = sum(len(unit.keys) for unit in units), len(getattr(self.parts, split))
        return min(1.0, self.config.data.max_failures * whole / n)

    def identity(self, variant: Variant) -> str:
        """What the rows of ``variant`` are called in the store."""
        return variant.identity(self.parts.identities)

    def target_of(self, keys: Sequence[str]) -> Tensor | None:
        """The classes to explain [B]; None: the predicted ones."""
        if self.config.model.target == "predicted":
            return None
        return torch.tensor([self.parts.labels.index(label) for label in self.parts.images.loc[list(keys), "label"]])

    def units(self, split: str, limit: int | None = None) -> list[Unit]:
        """The images of a split in units, in the order of their hashes; the first ``limit`` images or a few more."""
        keys, size = getattr(self.parts, split), self.config.run.unit
        n = len(keys) if limit is None else min(len(keys), math.ceil(limit / size) * size)
        parts = [tuple(keys[first : first + size]) for first in range(0, n, size)]
        return [Unit(f"{split}-{i:05d}-{self._short(part)}", part) for i, part in enumerate(parts)]

    @property
    def images_hash(self) -> str:
        """Changes with the validation and test images, and with their groups where these count."""
        keys = (self.parts.validation, self.parts.test)
        groups = [list(self.parts.images.loc[own, "group"]) for own in keys] if self.config.data.by_group else []
        return sha256(repr([*keys, *groups]).encode()).hexdigest()[:16]

    def _short(self, keys: Sequence[str]) -> str:
        """A few digits that differ where images differ, or what they are judged by: labels and masks."""
        rows = self.parts.images.loc[list(keys)]
        said: list[list[Any]] = [list(keys)]
        if self.config.model.target == "label":  # and which output of the model that is
            said.append([(label, self.parts.labels.index(label)) for label in rows["label"]])
        if set(self.config.test.metrics) - set(WITHOUT_MASKS):
            said.append([content_hash(Path(mask)) if mask else "" for mask in rows["mask"]])
        return sha256(repr(said).encode()).hexdigest()[:8]

    def _judge(self, unit: Unit, variants: Sequence[Variant], measures: Sequence[Measure]) -> tuple[Any, list[Failure]]:
        images = self.parts.images.loc[list(unit.keys)]
        masks = None
        if any(one.metric in METRICS and one.metric not in WITHOUT_MASKS for one in measures):
            masks = {Path(p): Path(m) for p, m in zip(images["path"], images["mask"], strict=True) if m}
        ((batch, read),) = read_rows(images, self.parts.transform, len(images), masks=masks, keep_without_mask=True)
        key = dict(zip(images["path"], images["key"], strict=True))
        failures = [Failure(key[str(e.path)], str(e.path), e.message) for e in batch.errors]
        if not batch.paths:
            return [], failures
        keys = list(read["key"])
        target = self.target_of(keys)
        seed = self.config.run.seed
        given = batch.images.to(self.parts.model.parameter.device)
        common: dict[str, Any] = {"keys": keys, "seed": seed}
        maps, found = explain(self.parts.model, given, variants, self.parts.saes, target=target, **common)
        names = [self.identity(variant) for variant in variants]
        judged = judge(self.parts.model, given, maps, names, measures, target=found.target, masks=batch.masks, **common)
        self.forwards += judged.forwards
        return judged.rows, failures
