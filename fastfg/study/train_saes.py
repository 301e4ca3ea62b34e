"""Train the SAEs of several blocks, and their controls, from tokens on disk; a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.files import read_json, write_durably
from fastfg.perturb.seeds import generator
from fastfg.sae.checkpoints import load_sae
from fastfg.sae.controls import RowsAtLimit
from fastfg.sae.recipe import KINDS, Recipe
from fastfg.sae.report import SAEReport, report
from fastfg.sae.trainer import SAETrainer
from fastfg.study.claims import alone
from fastfg.study.telling import Say
from fastfg.study.token_cache import TokenCache
from fastfg.study.weights import sae_fingerprint
from fastfg.types import integers

CHECKPOINT, LIMIT, REPORT = "checkpoint.safetensors", "limit.safetensors", "report.json"
FIRST = 2**15  # tokens that the scale and the geometric median are computed from
REPORTED = 2**15  # held-out tokens that the report is measured on, at most
ROWS_AT_LIMIT = "rows_at_limit"  # in the report of a soft-frozen SAE: the share of dictionary rows that were held back
EVERY = 20  # steps from one call of progress to the next

Progress = Callable[[int, int, dict[str, float]], None]  # steps done, steps in all, figures


def train_saes(
    cache: TokenCache,
    out: str | Path,
    recipe: Recipe,
    *,
    layers: int | Iterable[int] | None = None,
    kinds: str | Sequence[str] = ("trained",),
    held_out: float = 0.1,
    groups: Mapping[str, Any] | None = None,
    keys: Collection[str] | None = None,
    buffer: int = 2**18,
    device: str | torch.device = "cpu",
    checkpoint_every: int = 500,
    track: Callable[[str], Progress] | None = None,
    say: Say | None = None,
) -> dict[tuple[str, int], SAEReport]:
    """Train one SAE per kind and layer, and write it to ``out/<kind>/layer_<layer>``.

    SAEs that ``out`` already holds are not trained again, and an SAE that was stopped goes on from its last checkpoint.
    On a CPU with the same number of threads it gets the same weights, to the last bit, as without the stop. The
    order of batches depends on the cache's shards, and a cache whose writing was stopped may have others.

    Args:
        cache: tokens of :func:`fastfg.study.cache_tokens`.
        recipe: :class:`fastfg.sae.recipe.Recipe`; its ``kind`` is not used.
        layers: some of the cache's; None: all.
        kinds: of SAEs; the recipe lists them.
        held_out: share of the images (or of the groups) that is not trained on and that the reports are measured on.
        groups: {key: group}, such as the patient of each image; no group is on both sides.
        keys: the images to use; None: all of the cache's.
        buffer: tokens in memory, among which batches are shuffled.
        device: of the training.
        checkpoint_every: steps from one checkpoint to the next.
        track: takes a title and returns a function that is called with the steps done, the steps in all, and
            ``explained_variance``, ``l0``, ``dead_share`` of the batch and ``tokens_per_second``.
        say: called with a line if the file system has no locks; None: :func:`warnings.warn`.

    Returns {(kind, layer): report}; the explained variance of a report is that of held-out tokens. ``report.json`` of a
    ``soft-frozen`` SAE also has the share of dictionary rows that were at the limit after a training step or more:
    where it is 0, the limit never acted, and the SAE is no control. Raises ValueError
    that names the argument, also where ``out`` holds SAEs of another recipe, model or data.
    """
    layers = cache.layers if layers is None else integers("layers", layers)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    unknown = [layer for layer in layers if layer not in cache.layers]
    if unknown or not layers:
        raise ValueError(f"layers: expected some of {cache.layers}, which {cache.folder} holds, got {list(layers)}")
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or not kinds:
        raise ValueError(f"kinds: expected some of {KINDS}, got {list(kinds)}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: expected at least 1, got {checkpoint_every}")
    sides = cache.split(held_out, groups=groups, seed=recipe.seed, keys=keys)
    if set(kinds) != {"random"}:
        _check_batches(cache.count(sides[0]), recipe.batch_size, buffer)
    run = _Run(cache, Path(out), *sides, groups is not None, buffer, torch.device(device), checkpoint_every)
    found = {}
    for kind in kinds:
        for layer in layers:
            progress = _silent if track is None else track(f"{kind}, block {layer}")
            with alone(run.folder(kind, layer), "out", say):
                found[kind, layer] = run.train(replace(recipe, kind=kind), layer, progress)
    return found


def _check_batches(n: int, batch_size: int, buffer: int) -> None:
    """Require that ``n`` tokens fill a batch, and that the buffer can be shuffled."""
    if n < batch_size:
        raise ValueError(f"batch_size: expected at most the {n} tokens to train on, got {batch_size}")
    if buffer < 2 * batch_size:
        raise ValueError(f"buffer: expected at least two batches of {batch_size} tokens, got {buffer}")


def _silent(done: int, total: int, figures: dict[str, float]) -> None:
    pass


class _Run:
    """The tokens, split into two sides, and the folder that is written."""

    def __init__(
        self,
        cache: TokenCache,
        out: Path,
        trained: list[str],
        held_out: list[str],
        grouped: bool,
        buffer: int,
        device: torch.device,
        checkpoint_every: int,
    ) -> None:
        self.cache, self.out, self.buffer, self.device, self.every = cache, out, buffer, device, checkpoint_every
        self.trained, self.held_out = set(trained), set(held_out)
        self.data = {
            "images": len(trained),
            "held_out_images": len(held_out),
            "grouped": grouped,
            "keys": hashlib.sha256("\n".join([*trained, "", *held_out]).encode()).hexdigest(),
            "buffer": buffer,
            **{name: cache.recipe[name] for name in ("tokens_per_image", "dtype", "seed")},
        }

    def folder(self, kind: str, layer: int) -> Path:
        """Where an SAE is written."""
        return self.out / kind / f"layer_{layer}"

    def train(self, recipe: Recipe, layer: int, progress: Progress) -> SAEReport:
        """The report of one SAE, which is trained unless ``out`` holds it."""
        folder = self.folder(recipe.kind, layer)
        of = {"layer": layer, "weights": self.cache.recipe["weights"][str(layer)], "data": self.data}
        described = {"recipe": recipe.as_dict(), **of}
        if (folder / REPORT).exists():
            return _earlier(folder, described)
        trainer = SAETrainer(recipe, self._some(layer, self.trained, FIRST))
        checkpoint, limit = folder / CHECKPOINT, folder / LIMIT
        made_with = of | {"shards": self.cache.layout(self.trained)}
        if not checkpoint.exists():
            limit.unlink(missing_ok=True)
        rows = RowsAtLimit(trainer.W_dec, limit) if recipe.kind == "soft-frozen" else None
        if checkpoint.exists():
            trainer.resume(checkpoint, **made_with)

        def save() -> None:
            if rows is not None:
                rows.save()
            trainer.save(checkpoint, **made_with)

        self._steps(trainer, layer, progress, save, rows)
        sae = trainer.finish(site="resid_post", tokens="patches", **described)
        found = report(sae, self._some(layer, self.held_out, REPORTED), steps=trainer.steps)
        if (folder / REPORT).exists():  # without locks, another process may have been faster; its SAE may be in use
            _remove(checkpoint, limit)
            return _earlier(folder, described)
        sae.provenance["validation"] = asdict(found)
        sae.cpu().save(folder)
        _remove(checkpoint, limit)  # before the report, which says that the folder is complete
        told = described | {"report": asdict(found), "sae": sae_fingerprint(sae)}
        if rows is not None:
            told[ROWS_AT_LIMIT] = rows.share
        write_durably(folder / REPORT, json.dumps(told, indent=2).encode())
        return found

    def _steps(
        self,
        trainer: SAETrainer,
        layer: int,
        progress: Progress,
        save: Callable[[], None],
        rows: RowsAtLimit | None,
    ) -> None:
        recipe, started, before = trainer.recipe, time.monotonic(), trainer.done
        for tokens in self._batches(trainer, layer):
            losses, counts = trainer.train(tokens)
            done = trainer.done
            if rows is not None:
                rows.look(trainer.W_dec)
            if done % EVERY == 0 or done == recipe.steps:
                figures = trainer.progress(tokens, losses, counts)
                seconds = time.monotonic() - started
                figures["tokens_per_second"] = (done - before) * recipe.batch_size / max(seconds, 1e-9)
                progress(done, recipe.steps, figures)
            if done % self.every == 0 and done < recipe.steps:
                save()

    def _batches(self, trainer: SAETrainer, layer: int) -> Iterator[Tensor]:
        """The batches of the steps that are still to be done. Their order depends on the recipe's seed alone."""
        recipe = trainer.recipe
        while trainer.done < recipe.steps:
            epoch, first = divmod(trainer.done, self._per_epoch(recipe))
            options: dict[str, Any] = {"epoch": epoch, "seed": recipe.seed, "buffer": self.buffer, "keys": self.trained}
            batches = self.cache.batches(layer, recipe.batch_size, **options, device=self.device)
            yield from islice(batches, first, first + recipe.steps - trainer.done)

    def _per_epoch(self, recipe: Recipe) -> int:
        """The number of full batches in one pass over the tokens to train on."""
        return self.cache.count(self.trained) // recipe.batch_size

    def _some(self, layer: int, keys: set[str], n: int) -> Tensor:
        """About ``n`` tokens of the images among ``keys``, drawn at random, or all if there are fewer."""
        share, parts = min(1.0, n / max(1, self.cache.count(keys))), []
        for shard in self.cache.shards:
            tokens = self.cache.read(layer, shard, keys, self.device)
            drawn = torch.randperm(len(tokens), generator=generator(0, shard.name, "some tokens"))
            parts.append(tokens[drawn[: math.ceil(share * len(tokens))].sort().values.to(self.device)])
        return torch.cat(parts)


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _earlier(folder: Path, described: dict[str, Any]) -> SAEReport:
    """The report of an SAE that was trained before in the same way."""
    file = folder / REPORT
    again = "remove the folder to train it again"
    try:
        stored = read_json(file, "report", "sae")
        found = SAEReport.read(stored["report"])
        of_another = sae_fingerprint(load_sae(folder)) != stored["sae"]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"out: expected an SAE and its report in {folder}, got {error!r} ({again})") from None
    if of_another:
        raise ValueError(f"out: expected the SAE that {file} reports on in {folder}, got another one ({again})")
    for name, value in described.items():
        if stored.get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"out: expected a new folder, or SAEs with {name} {value}, got {stored.get(name)} in {folder}"
            )
    return found
