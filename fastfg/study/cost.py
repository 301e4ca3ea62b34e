"""What a study will cost on this device, from a short measurement, before anything of it is run."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastfg.attribution.residuals import residuals
from fastfg.data import Batch, batches
from fastfg.data.manifest import read_manifest
from fastfg.metrics.choose import WITHOUT_MASKS
from fastfg.models import Adapter, adapt
from fastfg.models.timm import preprocessing
from fastfg.sae.recipe import Recipe
from fastfg.sae.trainer import SAETrainer
from fastfg.study.backbone import start_model
from fastfg.study.config import Config, Train
from fastfg.study.head import head_classes
from fastfg.study.measures import Measure, judge, patches_per_step
from fastfg.study.prepare import check_training, load_classifier, study_keys
from fastfg.study.protocol import measures_of
from fastfg.study.selection import layer_variants, sweep_variants
from fastfg.study.variants import Variant, explain
from fastfg.types import Gate

if TYPE_CHECKING:
    import pandas as pd


ASIDE = 3  # random maps beside the first one in the measurement
STEPS = 2  # training steps that are timed, after a first one


@dataclass(frozen=True)
class Stage:
    """A part of the study: maps of ``variants`` variants on ``images`` images, judged in ``modes``."""

    title: str
    images: int
    variants: int
    modes: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    """What one image costs in one mode: forwards and seconds for no map, and for each map more."""

    forwards: float
    forwards_per_map: float
    seconds: float
    seconds_per_map: float


@dataclass(frozen=True)
class Cost:
    """The estimate: one row per stage, and the whole.

    Attributes:
        table: ``stage``, ``images``, ``variants``, ``forwards``, ``minutes`` of one process. Forwards are those of maps
            that share no masks, which is the most. The report is not counted.
        alone: minutes of it that one process works for the others, which wait: the tokens of the SAEs.
        memory: bytes of one process.
    """

    table: pd.DataFrame
    alone: float
    memory: int

    def minutes(self, processes: int = 1) -> float:
        """The whole, if each process has a core or a GPU."""
        return self.alone + (float(self.table["minutes"].sum()) - self.alone) / processes


def stages(config: Config, manifest: pd.DataFrame) -> list[Stage]:
    """The stages that judge maps, with the most variants that each can have."""
    protocol, test, there = config.protocol, config.test, manifest["split"].value_counts()
    n_validation = config.data.validation or int(there.get("validation", 0))
    n_test = config.data.test or int(there.get("test", 0))
    first, blocks = test.modes[:1], len(protocol.layers)
    most = min(protocol.max_layers, blocks)
    rounds = sum(blocks - size for size in range(1, most))
    return [
        Stage(
            "blocks, one at a time",
            _whole_units(protocol.layer_images, n_validation, config.run.unit),
            len(layer_variants(protocol)),
            tuple(first),
        ),
        Stage("combinations, at most", n_validation, blocks + rounds + len(protocol.combinations), tuple(first)),
        Stage("kappa and c_max", n_validation, len(sweep_variants(protocol, protocol.layers[:1])) + 1, tuple(first)),
        Stage("test", n_test, 2 + len(test.controls), tuple(test.modes)),
        Stage(
            "test, shuffled decoders",
            _whole_units(test.shuffled_images, n_test, config.run.unit),
            test.shuffled,
            tuple(test.modes),
        ),
    ]


def _whole_units(limit: int | None, n: int, unit: int) -> int:
    """How many of ``n`` images are judged with this limit: whole units, as the run does.

    >>> _whole_units(5, 100, 4), _whole_units(5, 7, 4), _whole_units(None, 7, 4)
    (8, 7, 7)
    """
    return n if limit is None else min(n, math.ceil(limit / unit) * unit)


def estimate(config: Config, device: torch.device, say: Callable[[str], None]) -> Cost:
    """Measure a few images, and multiply.

    Raises ValueError for a manifest that the run would refuse before its first score, and without a validation image
    that can be read.
    """
    import pandas as pd

    table = read_manifest(config.data.manifest)
    shown = table.set_index("key", drop=False).loc[study_keys(config, table)["validation"]]
    train = table[table["split"] == "train"]
    check_training(config, train)
    model, transform = _model(config, train, shown)
    adapter = adapt(model.to(device))
    batch = _first_images(shown, transform, config.run.unit, say)
    images, keys = batch.images.to(device), [Path(path).name for path in batch.paths]
    say(f"Measuring on {len(keys)} images and {device}")
    gh, gw = adapter.patches(images)
    per_step = patches_per_step(gh * gw, config.test.steps)
    measures = {
        mode: [one for one in own if one.metric in WITHOUT_MASKS]  # the others need no forwards
        for mode, own in measures_of(config, per_step).items()
    }
    rates = {mode: _rate(adapter, images, keys, own) for mode, own in measures.items()}
    passes, forward = _seconds_to_explain(adapter, images, config.protocol.layers), _seconds_of_forward(adapter, images)
    rows, alone = [], 0.0
    if config.model.probe:
        rows.append(_forwards_row("linear head", len(train) + len(shown), forward))
    if config.saes.train:
        tokens = _forwards_row("tokens for the SAEs", min(config.saes.train.images or len(train), len(train)), forward)
        alone = tokens["minutes"]
        rows.append(tokens)
        rows.append(_train_row(config, config.saes.train, images, adapter, device))
    for stage in stages(config, table):
        forwards = sum(
            stage.images * (rates[m].forwards + stage.variants * rates[m].forwards_per_map) for m in stage.modes
        )
        seconds = sum(
            stage.images * (rates[m].seconds + stage.variants * rates[m].seconds_per_map) for m in stage.modes
        )
        seconds += stage.images * passes
        rows.append(_row(stage.title, stage.images, stage.variants, round(forwards), seconds))
    return Cost(pd.DataFrame(rows), alone, _memory(device))


def _first_images(shown: pd.DataFrame, transform: Any, n: int, say: Callable[[str], None]) -> Batch:
    """The first ``n`` images that can be read, or fewer. Those before them that can't be read are said."""
    batch = next(batches([Path(path) for path in shown["path"]], transform, n))
    for error in batch.errors:
        say(f"Not read: {error.path}: {error.message}")
    if not batch.paths:
        raise ValueError(f"data.manifest: expected validation images that can be read, got none of {len(shown)}")
    return batch


def _model(config: Config, train: pd.DataFrame, shown: pd.DataFrame) -> tuple[Any, Any]:
    """The classifier; for one whose head is still to be fitted, with a random one, which costs the same."""
    given = config.model
    if not given.probe:
        return load_classifier(config)[:2]
    labels = head_classes(config, train, shown)
    model = start_model(given.name, given.weights, labels, img_size=given.img_size).model.eval()
    return model, preprocessing(model)


def _row(title: str, images: int, variants: int, forwards: int, seconds: float) -> dict[str, Any]:
    return {"stage": title, "images": images, "variants": variants, "forwards": forwards, "minutes": seconds / 60}


def _rate(model: Adapter, images: torch.Tensor, keys: Sequence[str], measures: Sequence[Measure]) -> Rate:
    """Judge one random map per image, and then several: the difference is what a map costs."""
    n = len(images)
    maps, found = explain(model, images, [Variant("random", method="random")], {}, keys=keys)
    random = torch.Generator().manual_seed(0)
    more = torch.cat([maps, *(torch.rand(maps.shape, generator=random).to(maps) for _ in range(ASIDE))])
    seconds, forwards = [], []
    for some in (more[:1], more[:1], more):  # the first time is not counted
        started = _now(images.device)
        names = [str(i) for i in range(len(some))]
        judged = judge(model, images, some, names, measures, target=found.target, keys=keys, seed=0)
        seconds.append(_now(images.device) - started)
        forwards.append(judged.forwards)
    per_map, per_map_forwards = (seconds[2] - seconds[1]) / ASIDE / n, (forwards[2] - forwards[1]) / ASIDE / n
    return Rate(
        forwards[1] / n - per_map_forwards, per_map_forwards, max(0.0, seconds[1] / n - per_map), max(0.0, per_map)
    )


def _seconds_to_explain(model: Adapter, images: torch.Tensor, layers: Sequence[int]) -> float:
    """Seconds per image for one attribution, without the SAEs' own part."""
    gates = [Variant("gate", Gate(tuple(layers), score="gradient_x_residual"))]
    found: list[float] = []
    for _ in range(2):
        started = _now(images.device)
        explain(model, images, gates, {})
        found.append(_now(images.device) - started)
    return found[-1] / len(images)


@torch.no_grad()
def _seconds_of_forward(model: Adapter, images: torch.Tensor) -> float:
    """Seconds per image for one forward."""
    found: list[float] = []
    for _ in range(2):
        started = _now(images.device)
        model.forward(images)
        found.append(_now(images.device) - started)
    return found[-1] / len(images)


def _forwards_row(title: str, images: int, forward: float) -> dict[str, Any]:
    """A stage that needs a forward per image and judges nothing. ``forward``: its seconds."""
    return _row(title, images, 0, 0, images * forward)


def _train_row(
    config: Config, how: Train, images: torch.Tensor, model: Adapter, device: torch.device
) -> dict[str, Any]:
    """The training of all SAEs, from the time of a few steps on random tokens."""
    (tokens,) = residuals(model, images[:1], config.protocol.layers[:1]).values()
    width = tokens.shape[-1]
    recipe = Recipe(n_features=how.expansion * width, k=how.k, steps=STEPS + 1, batch_size=how.batch_tokens, lr=how.lr)
    tokens = torch.randn(how.batch_tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    trainer = SAETrainer(recipe, tokens)
    trainer.train(tokens)
    started = _now(device)
    for _ in range(STEPS):
        trainer.train(tokens)
    step = (_now(device) - started) / STEPS
    trained = [kind for kind in config.kinds if kind != "random"]
    n = len(config.protocol.layers) * len(trained)
    return _row(f"training of {n} SAEs", 0, 0, 0, n * how.steps * step)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> int:
    """The peak of the measurement in bytes. It was made without the SAEs."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return peak
