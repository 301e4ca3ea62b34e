"""The images of a manifest for training: in an order, and with random crops, that a restart repeats."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastfg.data.image import read_image
from fastfg.data.manifest import SPLITS
from fastfg.files import write_tensors
from fastfg.study.telling import Track

if TYPE_CHECKING:
    import pandas as pd

Transform = Callable[[Any], Tensor]
Batch = tuple[Tensor, Tensor]  # images [b, C, H, W], or features [b, d], and classes [b]


class Pictures(Dataset[Any]):
    """The images of a manifest's rows. An item is (image [C, H, W] or None, class, path, error or None)."""

    def __init__(
        self,
        rows: pd.DataFrame,
        labels: Sequence[str],
        transform: Transform,
        seed: str | None,
        reading: Mapping[str, Any],
    ) -> None:
        self.paths, self.keys = list(rows["path"]), list(rows["key"])
        self.classes = [labels.index(label) for label in rows["label"]]
        self.transform, self.seed, self.reading = transform, seed, dict(reading)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor | None, int, str, str | None]:
        try:
            picture = read_image(Path(self.paths[i]), **self.reading).image
            if self.seed is None:
                image = self.transform(picture)
            else:
                with seeded(self.seed, self.keys[i]):
                    image = self.transform(picture)
        except Exception as error:  # for damaged files, decoders can raise anything; the error is reported
            return None, self.classes[i], self.paths[i], f"{type(error).__name__}: {error}"
        return image, self.classes[i], self.paths[i], None


class Images:
    """The images of a manifest, in batches, and the errors of those that can't be read.

    Args:
        table: a manifest from :func:`fastfg.data.read_manifest`.
        labels: the classes in the order of their indices.
        train_transform, transform: for training and for evaluation.
        batch_size, seed: of training.
        workers: processes that read images; 0 reads in this one. Batches are the same for any number.
        reading: options of :func:`fastfg.data.read_image`.
        max_failures: the largest share of the manifest's images that may be unreadable.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        labels: Sequence[str],
        train_transform: Transform,
        transform: Transform,
        batch_size: int,
        seed: int,
        workers: int = 0,
        reading: Mapping[str, Any] | None = None,
        max_failures: float = 0.0,
    ) -> None:
        self.table, self.labels, self.workers = table, tuple(labels), workers
        self.train_transform, self.transform = train_transform, transform
        self.batch_size, self.seed, self.reading, self.max_failures = batch_size, seed, reading or {}, max_failures
        self.errors: dict[str, str] = {}

    def train(self, epoch: int) -> Iterator[Batch]:
        """The training images in the order of this epoch."""
        rows = self.table[self.table["split"] == "train"]
        data = Pictures(rows, self.labels, self.train_transform, f"{self.seed}\n{epoch}", self.reading)
        return self._batches(data, order(len(rows), self.seed, epoch))

    def split(self, name: str) -> Iterator[Batch]:
        """The images of a split for evaluation, in the manifest's order."""
        rows = self.table[self.table["split"] == name]
        return self._batches(Pictures(rows, self.labels, self.transform, None, self.reading), range(len(rows)))

    def count(self, name: str) -> int:
        """How many images of a split the manifest has."""
        return int((self.table["split"] == name).sum())

    def _batches(self, data: Pictures, indices: Sequence[int]) -> Iterator[Batch]:
        if not len(indices):
            return
        loader: DataLoader[Any] = DataLoader(
            data,
            self.batch_size,
            sampler=indices,
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),  # otherwise the loader draws from the caller's
        )
        for items in loader:
            for _, _, path, error in items:
                if error is not None:
                    self._fail(path, error)
            whole = [(image, label) for image, label, _, _ in items if image is not None]
            if whole:
                yield torch.stack([image for image, _ in whole]), torch.tensor([label for _, label in whole])

    def _fail(self, path: str, error: str) -> None:
        self.errors[path] = error
        if len(self.errors) > self.max_failures * len(self.table):
            raise ValueError(
                f"max_failures: expected at most {self.max_failures:.2%} of {len(self.table)} images unreadable, got "
                f"{len(self.errors)}, the last one {path}: {error}"
            )


class Counted:
    """Images with a progress bar per split, which starts again with each pass."""

    def __init__(self, images: Images, track: Track | None) -> None:
        self.images, self.track = images, track
        self.bars: dict[str, Callable[[int, int], None]] = {}

    @property
    def errors(self) -> dict[str, str]:
        return self.images.errors

    def train(self, epoch: int) -> Iterator[Batch]:
        return self._counted("Training", self.images.train(epoch), self.count("train"))

    def split(self, name: str) -> Iterator[Batch]:
        return self._counted(f"Reading {name}", self.images.split(name), self.count(name))

    def count(self, name: str) -> int:
        return self.images.count(name)

    def _counted(self, title: str, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        if self.track is not None and title not in self.bars:
            self.bars[title] = self.track(title)
        done = 0
        for batch in batches:
            yield batch
            done += len(batch[1])
            if title in self.bars:
                self.bars[title](done, total)


class Features:
    """Features [n, d] in memory, with the batches of :class:`Images`."""

    def __init__(self, splits: Mapping[str, Batch], batch_size: int, seed: int) -> None:
        self.splits, self.batch_size, self.seed = splits, batch_size, seed
        self.errors: dict[str, str] = {}  # those of the images were found when the features were computed

    def train(self, epoch: int) -> Iterator[Batch]:
        x, y = self.splits["train"]
        for chosen in torch.tensor(order(len(x), self.seed, epoch)).split(self.batch_size):
            yield x[chosen], y[chosen]

    def split(self, name: str) -> Iterator[Batch]:
        x, y = self.splits[name]
        yield from zip(x.split(self.batch_size), y.split(self.batch_size), strict=True) if len(x) else ()

    def count(self, name: str) -> int:
        return len(self.splits[name][0])


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of n that depends on seed and epoch alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_number(str(seed), str(epoch)))).tolist()


@contextmanager
def seeded(*parts: str) -> Iterator[None]:
    """Context in which the random numbers of torch (CPU), NumPy and Python depend on ``parts`` alone. The generators
    are put back afterwards.
    """
    number = _number(*parts)
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.default_generator.manual_seed(number)  # torch.manual_seed also seeds the GPUs, which stay as they are
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def head_features(model: Any, source: Counted, file: Path, settings: Mapping[str, Any]) -> dict[str, Batch]:
    """{split: (what the head of a timm model gets, [n, d], and the classes [n])}, kept in ``file`` for a restart."""
    from safetensors import safe_open

    if file.is_file():
        with safe_open(file, "pt") as opened:
            described = json.loads(opened.metadata()["features"])
            check_settings(described["settings"], settings, file)
            source.images.errors.update(described["errors"])
            return {name: (opened.get_tensor(f"{name}/x"), opened.get_tensor(f"{name}/y")) for name in SPLITS}
    model.eval()
    device = next(model.parameters()).device
    empty = torch.zeros(0, model.get_classifier().in_features), torch.zeros(0, dtype=torch.long)
    found = {}
    for name in SPLITS:
        parts = [
            (model.forward_head(model.forward_features(x.to(device)), pre_logits=True).float().cpu(), y)
            for x, y in source.split(name)
        ]
        found[name] = (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) if parts else empty
    tensors = {f"{name}/{part}": value for name, pair in found.items() for part, value in zip("xy", pair, strict=True)}
    write_tensors(file, tensors, {"features": json.dumps({"settings": settings, "errors": source.images.errors})})
    return found


def check_settings(earlier: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError that names the settings that differ from those of an earlier run in the same folder."""
    earlier, now = _flat(earlier), _flat(json.loads(json.dumps(now)))
    other = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
    if other:
        differ = ", ".join(f"{name} {now.get(name)!r} (there: {earlier.get(name)!r})" for name in other[:3])
        raise ValueError(f"out: expected the settings of the run in {where.parent}, or a new folder, got {differ}")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with those of a group on their own, such as ``recipe.epochs``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        group = isinstance(value, dict) and value
        found |= {f"{name}.{one}": value[one] for one in value} if group else {name: value}
    return found
