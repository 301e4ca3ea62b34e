"""``fastfg attribute``: one map and one overlay per image."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import add_command, count, say

if TYPE_CHECKING:
    from torch import Tensor

    from fastfg.cli.inputs import Inputs
    from fastfg.cli.results import Results
    from fastfg.data import Batch
    from fastfg.study.shards import Unit

COLUMNS = ("path", "key", "map", "overlay", "target", "predicted", "probability", "warning")
STORED = {  # columns of the shards
    "image": "string",
    "map": "string",
    "overlay": "string",
    "target": "int64",
    "predicted": "int64",
    "probability": "float64",
    "warning": "string",
}
UNUSUAL = re.compile(r"[^\w.()\[\]+ -]")  # in a file's name
WRITES = """Writes to --out:
  attributions.csv  one row per image: path, key, map and overlay (names of the
                    files), target, predicted (classes), probability (of the
                    target), and warning: why a map explains nothing:
                    a blank image, a constant map, NaN or infinite values
  NNNNNN-NAME.npy   the map, one raw value per patch
  NNNNNN-NAME.png   the map as a heatmap over the image that the model sees
  config.json       the arguments, versions, and hashes of the weights
  shards, errors.csv, errors.parquet, windows.csv, fastfg.json: see below

Examples:
  fastfg attribute photographs --model vit_base_patch16_224 \\
    --weights vit.safetensors --out out/maps
  fastfg attribute photographs --model vit_base_patch16_224 \\
    --weights vit.safetensors --saes out/saes/trained --layers 2 3 4 \\
    --out out/gated

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NOTES, add_input_arguments
    from fastfg.cli.results import NOTES as RESUMING
    from fastfg.cli.results import add_result_arguments

    summary = "Explain images: one map and one overlay per image."
    command = add_command(commands, "attribute", run, summary, WRITES + RESUMING + NOTES)
    add_input_arguments(command)
    add_result_arguments(command)


def run(arguments: argparse.Namespace) -> None:
    from fastfg.cli.inputs import Inputs
    from fastfg.cli.results import Results
    from fastfg.study.shards import Work

    inputs = Inputs(arguments)
    results, work = Results(arguments, inputs, STORED), Work(("map",), ("map",))
    unfinished = list(inputs.out.glob(".*.tmp"))  # of runs that were killed, or of processes that are still writing
    results.start()
    _forget_lost(inputs.out, results)
    with inputs:
        try:
            title = f"Explaining {count(len(inputs.paths), 'image')}"
            results.run(work, title, lambda batch, _: _explain(inputs, results, batch, unfinished))
        finally:  # also after Ctrl-C or an error
            _write(inputs.out / "attributions.csv", results.rows(work))


def _forget_lost(out: Path, results: Results) -> None:
    """Let batches be computed again whose maps are no longer in the folder."""
    results.store.refresh()  # before the maps are listed: a batch has its maps before it has its shard
    there = {file.name for file in out.glob("*.npy")}

    def lost(unit: Unit, failed: Collection[str]) -> bool:
        names = (_output_name(results.number[key], results.paths[key].stem) for key in unit.keys if key not in failed)
        return any(f"{name}.npy" not in there for name in names)

    if n := results.store.forget_where(lost, results.units):
        say(f"Maps are missing in {out}: {n} batch{'es' * (n > 1)} computed again")


def _explain(inputs: Inputs, results: Results, batch: Batch, unfinished: Sequence[Path]) -> list[dict[str, Any]]:
    """Write the maps of a batch, in threads, and return its rows. Its files among ``unfinished`` are removed."""
    from fastfg.attribution.attribute import attribute
    from fastfg.data import path_text
    from fastfg.data.threads import in_threads, n_readers
    from fastfg.perturb import image_key
    from fastfg.report.overlay import displayed
    from fastfg.targets import probabilities

    found = attribute(inputs.model, batch.images, saes=inputs.saes, gate=inputs.gate, target=inputs.target(batch.paths))
    images, maps, target = (t.cpu() for t in (batch.images, found.maps, found.target))
    heat = found.heatmap((images.shape[-2], images.shape[-1])).cpu()
    probability = probabilities(found.logits).cpu()
    mean, std = inputs.adapter.pixel_mean, inputs.adapter.pixel_std

    def explained(i: int) -> dict[str, Any]:
        path = batch.paths[i]
        name = _output_name(results.number[path_text(path)], path.stem)
        if results.store.locks:  # so no other process has this batch
            for file in unfinished:
                if file.name.startswith((f".{name}.npy.", f".{name}.png.")):
                    file.unlink(missing_ok=True)
        overlay = _write_map(inputs.out / name, displayed(images[i], mean, std), maps[i], heat[i])
        about: dict[str, Any] = {"target": int(target[i]), "predicted": int(probability[i].argmax())}
        about |= {"probability": float(probability[i, target[i]]), "warning": _warning(images[i], maps[i])}
        files = {"image": image_key(images[i]), "map": f"{name}.npy", "overlay": overlay}
        return {"key": path_text(path), "variant": "map", "measure": "map", **files, **about}

    return list(in_threads(explained, range(len(batch.paths)), n_readers()))


def _write_map(path: Path, picture: Tensor, one: Tensor, heat: Tensor) -> str:
    """Write a map and its overlay. Returns the overlay's name, empty for a map that can't be drawn."""
    import numpy as np

    from fastfg.files import write_durably
    from fastfg.report.overlay import save_overlay

    values = io.BytesIO()
    np.save(values, one.numpy())
    write_durably(path.with_name(f"{path.name}.npy"), values.getvalue())
    if not bool(heat.isfinite().all()):
        return ""
    overlay = path.with_name(f"{path.name}.png")
    save_overlay(overlay, picture, heat)
    return overlay.name


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from fastfg.cli.inputs import write_csv

    if not write_csv(file, COLUMNS, [[row["key"], row["image"], *(row[name] for name in COLUMNS[2:])] for row in rows]):
        return
    say(f"Wrote {count(len(rows), 'map')} with overlays, listed in {file}")
    warned = sum(bool(row["warning"]) for row in rows)
    if warned:
        say(f"Warning: {count(warned, 'map')} cannot explain anything, see the column `warning`")


def _output_name(number: int, stem: str) -> str:
    """The name of an output file without its suffix. Its number makes it unique; it is short enough for a file name."""
    return f"{number:06d}-{UNUSUAL.sub('_', stem)[:40]}"


def _warning(image: Tensor, explained: Tensor) -> str:
    """Why the map [gh, gw] of ``image`` [C, H, W] explains nothing; empty if it does explain something."""
    if bool((image.flatten(1).amin(1) == image.flatten(1).amax(1)).all()):
        return "blank image: all pixels are equal"
    if not bool(explained.isfinite().all()):
        return "map with NaN or infinite values"
    return "constant map: all patches are equal" if bool(explained.amin() == explained.amax()) else ""
