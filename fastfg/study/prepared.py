"""What several processes prepare together: each part is made once, from what is recorded, and reading is checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastfg.data import Batch, batches
from fastfg.data.manifest import content_hash
from fastfg.data.threads import n_readers
from fastfg.files import read_json, write_durably
from fastfg.study.claims import Claims
from fastfg.study.config import Config

if TYPE_CHECKING:
    import pandas as pd

PREPARED, SAES = "prepared.json", "saes.json"
WAIT = 1.0  # seconds between looks at what another process makes
BATCH = 16

MADE = {  # {part of a study: its files}
    "the head": "model/*",
    "the tokens": "tokens/*/*",
    "the SAEs": "saes/*/*/*",
    "the scores": "scores/shards/*.parquet",
}
OF_TOKENS, OF_SAES = ("the tokens", "the SAEs", "the scores"), ("the SAEs", "the scores")
MADE_WITH = {  # {setting: the parts that depend on it}; all parts depend on the others
    "model.classes": ("the head", "the scores"),
    "model.templates": ("the scores",),
    "validation images": ("the head", "the scores"),
    "saes.train.images": OF_TOKENS,
    "saes.train.tokens_per_image": OF_TOKENS,
    **{f"saes.train.{name}": OF_SAES for name in ("expansion", "k", "steps", "batch_tokens", "lr")},
}
IMAGES = {  # {a hash in the record: what it is of}
    "training images": "data.manifest: expected the training images, with their labels and groups",
    "validation images": "data.validation: expected the validation images, with their labels",
}


@dataclass(frozen=True)
class Thing:
    """Something that several processes need: ``make`` makes it if it is not ``ready``."""

    name: str
    ready: Callable[[], bool]
    make: Callable[[], None]


class Once:
    """Makes things that several processes need. Each is made by one of them, and all wait until everything is ready."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(out / ".lock", say)

    def __call__(self, *things: Thing) -> None:
        while missing := [thing for thing in things if not thing.ready()]:
            if not any(self._made(thing) for thing in missing):
                time.sleep(WAIT)

    def _made(self, thing: Thing) -> bool:
        """Make it, unless another process holds it."""
        with self.claims(thing.name) as held:
            if held and not thing.ready():
                thing.make()
            return held


def check_prepared(config: Config, train: pd.DataFrame, validation: pd.DataFrame, once: Once) -> None:
    """Record what the model and the SAEs are made from, or refuse a folder where they were made from something else.

    A setting can be changed as long as nothing was made with it.

    Args:
        train, validation: the manifest's rows.

    Raises ValueError that names the first setting that differs and what was made with it.
    """
    given, how = config.model, config.saes.train
    found: dict[str, Any] = {
        "model.name": given.name,
        "model.weights": None if given.weights is None else content_hash(given.weights),
        "model.img_size": given.img_size,
        "model.probe": given.probe,
        "run.seed": config.run.seed,
    }
    if given.probe or how:
        found["training images"] = _hash(train[["key", "label", "group"]])
    if given.probe:
        found |= {"model.classes": given.classes, "validation images": _hash(validation[["key", "label"]])}
    if given.zero_shot:
        found |= {"model.classes": given.classes, "model.templates": given.templates}
    if how:
        found |= {f"saes.train.{name}": value for name, value in how.model_dump().items()}
    file = config.run.out / PREPARED
    once(Thing("prepared", lambda: _recorded(file) == found, lambda: _record(file, found)))


def check_saes(out: Path, identities: Mapping[str, Mapping[int, str]], once: Once) -> None:
    """Record the SAEs that the study in ``out`` uses, or refuse others than those that its scores were made with.

    Those of more kinds or blocks are added.

    Args:
        identities: {kind: {block: a hash of the SAE}}.
    """
    file = out / SAES
    found = {f"{kind}, block {block}": one for kind, of_kind in identities.items() for block, one in of_kind.items()}

    def record() -> None:
        before = _recorded(file) or {}
        other = [name for name, one in found.items() if before.get(name, one) != one]
        if other and any(out.glob(MADE["the scores"])):
            raise ValueError(
                f"saes: expected the SAEs that the scores in {out} were made with, got another one for "
                f"{'; '.join(other)} (other SAEs need another folder)"
            )
        write_durably(file, json.dumps(before | found, indent=2).encode())

    once(Thing("the record of SAEs", lambda: found.items() <= (_recorded(file) or {}).items(), record))


def _recorded(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None


def _record(file: Path, found: dict[str, Any]) -> None:
    """Write ``found`` to ``file``. Raises ValueError if its folder has parts that were made from something else."""
    before, out = _recorded(file) or {}, file.parent
    there = [part for part, files in MADE.items() if any(not one.name.startswith(".") for one in out.glob(files))]
    for name, value in before.items():
        made = [part for part in there if part in MADE_WITH.get(name, MADE)]
        if made and value != found.get(name):
            which = f"which {_listed(made)} in {out} {'was' if made == ['the head'] else 'were'} made with"
            if name in IMAGES:
                raise ValueError(
                    f"{IMAGES[name]}, {which}, got others (other images, labels or groups need another folder)"
                )
            raise ValueError(
                f"{name}: expected {value!r}, {which}, got {found.get(name)!r} (another one needs another folder)"
            )
    write_durably(file, json.dumps(found, indent=2).encode())


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _hash(rows: pd.DataFrame) -> str:
    return sha256(rows.to_csv(index=False).encode()).hexdigest()


def read_rows(images: pd.DataFrame, transform: Any, size: int, **options: Any) -> Iterator[tuple[Batch, pd.DataFrame]]:
    """The images of a manifest's rows in batches of ``size``, each with the rows of those that could be read.

    ``options`` are those of :func:`fastfg.data.batches`.
    """
    by_path = images.set_index("path", drop=False)
    for batch in batches([Path(path) for path in images["path"]], transform, size, readers=n_readers(), **options):
        yield batch, by_path.loc[[str(path) for path in batch.paths]]


def read_images(
    images: pd.DataFrame, transform: Any, max_failures: float, say: Callable[[str], None], at_least: int = 1
) -> Iterator[tuple[Tensor, list[str]]]:
    """The images of a manifest's rows in batches, with their keys. Those that can't be read are said.

    Raises ValueError if their share is above ``max_failures``, or if fewer than ``at_least`` images can be read.
    """
    failed, read = 0, 0
    for batch, rows in read_rows(images, transform, BATCH):
        for error in batch.errors:
            failed += 1
            say(f"Not read: {error.path}: {error.message}")
        if failed > max_failures * len(images):
            raise ValueError(
                f"data.max_failures: expected at most {max_failures:g} of {len(images)} images to be unreadable, got "
                f"{failed}; the last one: {batch.errors[-1].path}: {batch.errors[-1].message}"
            )
        if batch.paths:
            read += len(batch.paths)
            yield batch.images, list(rows["key"])
    if read < at_least:
        raise ValueError(f"data.manifest: expected images that can be read, got none of {len(images)}")
