"""Train a classifier with timm's optimizer and schedule, and stop early. A run that was stopped goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfg.files import write_tensors
from fastfg.models.timm import import_timm
from fastfg.study.accuracy import Accuracy
from fastfg.study.classifier_data import Batch, check_settings, seeded

META = "training"  # the entry of a checkpoint's metadata
FIGURES = ("loss", "validation_loss", "validation_accuracy", "validation_balanced_accuracy")  # of an epoch


class Source(Protocol):
    """Batches of inputs and classes, and ``errors`` {path: why it was not read} of those that were read so far."""

    @property
    def errors(self) -> dict[str, str]: ...
    def train(self, epoch: int) -> Iterator[Batch]: ...
    def split(self, name: str) -> Iterator[Batch]: ...
    def count(self, name: str) -> int: ...


@dataclass(frozen=True)
class FineTuning:
    """How to train. The parts are timm's: its optimizers, cosine schedule and training transform.

    Args:
        head_only: train the head alone, on features of the frozen backbone (a linear probe). The features are of the
            evaluation transform: there are no random crops.
        epochs: at most; None: 100 for ``head_only``, else 20.
        patience: epochs without a lower validation loss after which training stops.
        batch_size: images per step.
        optimizer: a name of ``timm.optim``.
        lr: the highest learning rate; None: 1e-3 for ``head_only``, else 1e-4.
        weight_decay: not applied to biases and norms.
        warmup_epochs: epochs in which the learning rate rises; it then falls along a cosine.
        layer_decay: factor of the learning rate from a block to the one below, such as 0.75; None: none.
        class_weights: ``balanced`` weighs the loss of an image by n / (classes x images of its class); ``none`` does
            not.
        label_smoothing: of the cross-entropy in training.
        crop_scale: (low, high) share of the area that a random crop keeps; (1, 1): no crop but the evaluation's size.
        hflip: the chance of a horizontal flip. color_jitter: strength; 0: none.
        auto_augment: a policy of timm, such as ``rand-m9-mstd0.5``.
        seed: of the head, the order of the images and the crops.
    """

    head_only: bool = False
    epochs: int | None = None
    patience: int = 5
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.05
    warmup_epochs: int = 1
    layer_decay: float | None = None
    class_weights: str = "balanced"
    label_smoothing: float = 0.0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        defaults = {"epochs": 100 if self.head_only else 20, "lr": 1e-3 if self.head_only else 1e-4}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < int(self.epochs or 0):
            raise ValueError(f"warmup_epochs: expected 0 to {int(self.epochs or 0) - 1}, got {self.warmup_epochs}")
        if not 0 < float(self.lr or 0) < math.inf:
            raise ValueError(f"lr: expected a number > 0, got {self.lr}")
        if self.class_weights not in ("balanced", "none"):
            raise ValueError(f"class_weights: expected balanced or none, got {self.class_weights!r}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale: expected 0 < low <= high <= 1, got {low} and {high}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected a number above 0 and at most 1, got {self.layer_decay}")
        for name, value in (("label_smoothing", self.label_smoothing), ("hflip", self.hflip)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {value}")


@dataclass
class Progressed:
    """What a checkpoint keeps beside the weights."""

    history: list[dict[str, float]]
    best_epoch: int = -1
    best_loss: float = math.inf


def fit(
    network: nn.Module,
    source: Source,
    labels: Sequence[str],
    recipe: FineTuning,
    weights: Tensor,
    checkpoint: Path,
    settings: Mapping[str, Any],
    progress: Callable[[int, dict[str, float]], None],
) -> Progressed:
    """Train ``network`` until the validation loss has not fallen for ``patience`` epochs; it ends with the best
    weights.

    After each epoch, ``checkpoint`` is replaced as a whole. If it is there, training goes on from it, and on a CPU with
    the same number of threads ends with the same weights as without the stop.

    Args:
        network: images or features -> logits [b, n]; on the device of training.
        weights: [n] of the classes in the loss.
        settings: what has to be the same for training to go on.
        progress: called after each epoch with the epoch and its figures.

    Raises ValueError for a loss that is not finite, and for a checkpoint of other settings.
    """
    import_timm()
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    epochs, lr = int(recipe.epochs or 0), float(recipe.lr or 0)
    decay: dict[str, Any] = {} if recipe.layer_decay is None else {"layer_decay": recipe.layer_decay}
    optimizer = create_optimizer_v2(network, opt=recipe.optimizer, lr=lr, weight_decay=recipe.weight_decay, **decay)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", epochs, warmup_epochs=recipe.warmup_epochs, warmup_lr=lr / 100, min_lr=lr / 100
    )
    best = {name: value.clone() for name, value in network.state_dict().items()}
    state = Progressed([])
    if checkpoint.is_file():
        state, best = _resume(network, optimizer, source, checkpoint, settings)
    while (epoch := len(state.history)) < epochs and epoch - state.best_epoch <= recipe.patience:
        schedule.step(epoch)
        loss = _train(network, source, optimizer, weights, recipe, epoch)
        validation_loss, accuracy = evaluate(network, source, "validation", labels, weights)
        if not math.isfinite(validation_loss):
            raise ValueError(f"validation: expected a finite loss, got {validation_loss} in epoch {epoch}")
        reached = (loss, validation_loss, accuracy.accuracy, accuracy.balanced)
        figures = dict(zip(FIGURES, reached, strict=True))
        state.history.append(figures)
        if validation_loss < state.best_loss:
            state.best_epoch, state.best_loss = epoch, validation_loss
            best = {name: value.clone() for name, value in network.state_dict().items()}
        _save(network, optimizer, best, state, source, checkpoint, settings)
        progress(epoch, figures)
    network.load_state_dict(best)
    return state


def class_weights(labels: Sequence[str], of_images: Sequence[str], kind: str) -> Tensor:
    """[n]: n_images / (n_classes x images of the class) for ``balanced``, else ones.

    >>> from fastfg.study.fit import class_weights
    >>> class_weights(("a", "b"), ["a", "a", "a", "b"], "balanced")
    tensor([0.6667, 2.0000])

    Raises ValueError for a class without images.
    """
    counts = [sum(label == one for one in of_images) for label in labels]
    if 0 in counts:
        raise ValueError(f"label: expected training images of each class, got none of {labels[counts.index(0)]!r}")
    if kind == "none":
        return torch.ones(len(labels))
    return torch.tensor([len(of_images) / (len(labels) * n) for n in counts])


@torch.no_grad()
def evaluate(
    network: nn.Module, source: Source, split: str, labels: Sequence[str], weights: Tensor
) -> tuple[float, Accuracy]:
    """The mean loss per class weight, and the accuracy, on a split. The loss of no images is NaN."""
    network.eval()
    device = next(network.parameters()).device
    total, weight, true, predicted = 0.0, 0.0, [], []
    for x, y in source.split(split):
        logits = network(x.to(device)).float()
        if not bool(logits.isfinite().all()):
            raise ValueError(f"model: expected finite logits on {split}, got NaN or infinity")
        y = y.to(device)
        total += float(F.cross_entropy(logits, y, weights.to(device), reduction="sum"))
        weight += float(weights.to(device)[y].sum())
        true += y.tolist()
        predicted += logits.argmax(1).tolist()
    return total / weight if weight else math.nan, Accuracy.of(labels, true, predicted)


def _train(
    network: nn.Module,
    source: Source,
    optimizer: torch.optim.Optimizer,
    weights: Tensor,
    recipe: FineTuning,
    epoch: int,
) -> float:
    """One epoch. Returns the mean loss of its steps."""
    network.train()
    device = next(network.parameters()).device
    losses = []
    with seeded(str(recipe.seed), str(epoch), "dropout"):
        for x, y in source.train(epoch):
            loss = F.cross_entropy(
                network(x.to(device)).float(),
                y.to(device),
                weights.to(device),
                label_smoothing=recipe.label_smoothing,
            )
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"lr: expected a finite loss, got {value} in epoch {epoch} with lr={recipe.lr}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(value)
    if not losses:
        raise ValueError("train: expected at least one image that can be read, got none")
    return sum(losses) / len(losses)


def _save(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    state: Progressed,
    source: Source,
    file: Path,
    settings: Mapping[str, Any],
) -> None:
    """Replace the checkpoint as a whole."""
    tensors = {f"network/{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    described = {"settings": settings, "state": asdict(state), "optimizer": numbers, "errors": source.errors}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    write_tensors(file, tensors, {META: json.dumps(described, sort_keys=True)})


def _resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, source: Source, file: Path, settings: Mapping[str, Any]
) -> tuple[Progressed, dict[str, Tensor]]:
    """Load a checkpoint into network, optimizer and the errors of ``source``. Returns its progress and best weights."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        described = json.loads((opened.metadata() or {})[META])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    check_settings(described["settings"], settings, file)
    device = next(network.parameters()).device
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    network.load_state_dict(parts["network"])
    values: dict[int, dict[str, Any]] = {}
    for name, value in (parts["optimizer"] | described["optimizer"]).items():
        index, _, rest = name.partition("/")
        values.setdefault(int(index), {})[rest] = value
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    source.errors.update(described.get("errors", {}))
    state = described["state"]
    history = [{name: figures[name] for name in FIGURES} for figures in state["history"]]
    return Progressed(**state | {"history": history}), {name: value.to(device) for name, value in parts["best"].items()}
