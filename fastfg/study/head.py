"""The linear head of a study: all processes compute features, a part of the images at a time, and one fits the head."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastfg.data.manifest import verify_content
from fastfg.files import read_json, write_durably
from fastfg.models.saved import save_classifier
from fastfg.models.timm import preprocessing
from fastfg.study.accuracy import Accuracy
from fastfg.study.backbone import start_model
from fastfg.study.config import Config
from fastfg.study.prepared import Once, Thing, read_images
from fastfg.study.probe import features_of, fit_head
from fastfg.study.telling import Say, Track

if TYPE_CHECKING:
    import pandas as pd

ACCURACY = "accuracy.json"
PART = 128  # images


def make_head(
    config: Config,
    device: torch.device,
    train: pd.DataFrame,
    shown: pd.DataFrame,
    once: Once,
    say: Say,
    track: Track,
) -> Accuracy:
    """Fit a linear head on the images ``train``, and write the classifier to the study's folder ``model``.

    Returns its accuracy on the images ``shown``.
    """
    given, folder, classes = config.model, config.run.out / "model", head_classes(config, train, shown)
    folder.mkdir(parents=True, exist_ok=True)
    ready = (folder / ACCURACY).exists
    start = cache(
        partial(start_model, given.name, given.weights, classes, img_size=given.img_size, seed=config.run.seed)
    )

    def compute(images: pd.DataFrame, max_failures: float) -> dict[str, Tensor]:
        return _features(start().model.eval().to(device), images, max_failures, say)

    splits = [
        _Split(name, images, folder, config.data.max_failures, compute)
        for name, images in (("training", train), ("validation", shown))
    ]
    if not ready():
        for split in splits:
            once(*split.things(ready, track(f"Features of {len(split.images)} {split.name} images")))

    def fit() -> None:
        made = start()
        (features, labels), (held, truth) = (split.read(classes) for split in splits)
        fit_head(made.model.eval().cpu(), features, labels)
        if ready():  # without locks, another process may have been faster; its head may be in use
            return
        reached = asdict(Accuracy.of(classes, truth.tolist(), made.model.head(held).argmax(1).tolist()))
        about = {"head": "a linear probe", "validation": reached}
        save_classifier(folder, made.model, made.architecture, classes, model_args=made.model_args, about=about)
        write_durably(folder / ACCURACY, json.dumps(reached).encode())

    once(Thing("model", ready, fit))
    stored = read_json(folder / ACCURACY, "labels", "confusion")
    found = Accuracy.read(stored["labels"], stored["confusion"], folder / ACCURACY)
    for line in found.sentences("validation, linear head"):
        say(line)
    return found


def head_classes(config: Config, train: pd.DataFrame, shown: pd.DataFrame) -> tuple[str, ...]:
    """The classes of the head. Raises ValueError unless they are at least two, with all labels of the images."""
    if not len(train):
        raise ValueError("data.manifest: expected images of the split 'train', for the linear head, got none")
    classes = tuple(config.model.classes or sorted(set(train["label"])))
    if len(classes) < 2:
        source = "" if config.model.classes else ", the labels of the training images"
        raise ValueError(f"model.classes: expected at least 2 classes, got {classes}{source}")
    for split, images in (("training", train), ("validation", shown)):
        if unknown := sorted(set(images["label"]) - set(classes)):
            raise ValueError(
                f"model.classes: expected the labels of all {split} images among the classes, got {unknown} beside "
                f"{classes}"
            )
    return classes


def unlearned(images: pd.DataFrame, known: Collection[str]) -> str:
    """A sentence about the labels of ``images`` that are not among those the model knows; empty if all of them are."""
    counts = images.loc[~images["label"].isin(list(known)), "label"].value_counts().sort_index()
    if not len(counts):
        return ""
    listed = ", ".join(f"{label} ({n} image{'s' * (n > 1)})" for label, n in counts.items())
    return f"Without a class that the model has learned: {listed}. The scores of these images are in all means"


def without_features(config: Config, train: pd.DataFrame) -> list[str]:
    """The keys of the images ``train`` that could not be read when the head was fitted."""
    lost = []
    for file, images in _parts("training", train, config.run.out / "model"):
        if _is_whole(file):
            with safe_open(file, "pt") as opened:
                rows = opened.get_tensor("rows")
            lost += list(images["key"].iloc[_lost(rows, images)])
    return lost


def _parts(split: str, images: pd.DataFrame, folder: Path) -> list[tuple[Path, pd.DataFrame]]:
    """The files with the features of a split, and the images of each."""
    n = -(-len(images) // PART)
    bounds = [len(images) * i // n for i in range(n + 1)]
    return [
        (folder / f"features-{split}-{first:06d}.safetensors", images.iloc[first:last])
        for first, last in pairwise(bounds)
    ]


def _lost(rows: Tensor, images: pd.DataFrame) -> list[int]:
    """The rows of ``images`` that are not among those of a file with features."""
    return sorted(set(range(len(images))) - set(rows.tolist()))


@torch.no_grad()
def _features(model: Any, images: pd.DataFrame, max_failures: float, say: Say) -> dict[str, Tensor]:
    """The ``features`` [n, d] of the images that can be read, and their ``rows`` [n] among ``images``."""
    verify_content(images)
    features, rows, device = [torch.empty(0)], [], next(model.parameters()).device
    place = {key: row for row, key in enumerate(images["key"])}
    for batch, keys in read_images(images, preprocessing(model), max_failures, say, at_least=0):
        features.append(features_of(model, batch.to(device)).cpu())
        rows += [place[key] for key in keys]
    return {"features": torch.cat(features), "rows": torch.tensor(rows, dtype=torch.long)}


def _is_whole(file: Path) -> bool:
    """Whether the features are there and not damaged."""
    try:
        with safe_open(file, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


@dataclass(frozen=True)
class _Split:
    """The features of a split's ``images``, in files of about ``PART`` images.

    Attributes:
        max_failures: the share of the images that may be unreadable.
        compute: takes images and their own ``max_failures``.
    """

    name: str
    images: pd.DataFrame
    folder: Path
    max_failures: float
    compute: Callable[[pd.DataFrame, float], dict[str, Tensor]]

    @property
    def parts(self) -> list[tuple[Path, pd.DataFrame]]:
        """The files, and the images of each."""
        return _parts(self.name, self.images, self.folder)

    def things(self, ready: Callable[[], bool], progress: Callable[[int, int], None]) -> list[Thing]:
        """The files to make, unless the head is ``ready``."""

        def make(file: Path, images: pd.DataFrame) -> None:
            limit = min(1.0, self.max_failures * len(self.images) / len(images))  # of them; all are counted in read
            write_durably(file, save(self.compute(images, limit)))
            progress(sum(len(part) for other, part in self.parts if other.exists()), len(self.images))

        def there(file: Path) -> bool:
            return ready() or _is_whole(file)

        return [Thing(file.name, partial(there, file), partial(make, file, images)) for file, images in self.parts]

    def read(self, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features [n, d] and classes [n]. Raises ValueError if too few images could be read."""
        features, labels, failed, incomplete = [], [], [], []
        for file, images in self.parts:
            found, given = load_file(file), list(images["label"])
            rows = found["rows"].tolist()
            features.append(found["features"])
            labels += [classes.index(given[row]) for row in rows]
            if lost := _lost(found["rows"], images):
                failed += list(images["path"].iloc[lost])
                incomplete.append(file)
        if len(failed) > self.max_failures * len(self.images) or not labels:
            for file in incomplete:  # so that the next run tries again
                file.unlink()
            raise ValueError(
                f"data.max_failures: expected at most {self.max_failures:g} of {len(self.images)} images to be "
                f"unreadable, got {len(failed)}: {', '.join(failed[:3])}{', ...' * (len(failed) > 3)}"
            )
        return torch.cat(features), torch.tensor(labels)
