"""``fastfg attribute``: one map and one overlay per image."""

from __future__ import annotations

import argparse
import re
from typing import Any

from torch import Tensor

from fastfg.cli.console import add_command, count, say, tracker

COLUMNS = ("path", "key", "map", "overlay", "target", "predicted", "probability", "warning")
UNUSUAL = re.compile(r"[^\w.()\[\]+ -]")  # in a file's name
WRITES = """Writes to --out:
  attributions.csv  one row per image: path, key, map and overlay (names of the
                    files), target, predicted (classes), probability (of the
                    target), and warning: why a map explains nothing:
                    a blank image, a constant map, NaN or infinite values
  NNNNNN-NAME.npy   the map, one raw value per patch
  NNNNNN-NAME.png   the map as a heatmap over the image that the model sees
  errors.csv, windows.csv, fastfg.json: see below

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NOTES, add_input_arguments

    summary = "Explain images: one map and one overlay per image."
    command = add_command(commands, "attribute", run, summary, WRITES + NOTES)
    add_input_arguments(command)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fastfg.attribution.attribute import attribute
    from fastfg.cli.inputs import CSVRows, Inputs
    from fastfg.data import path_text
    from fastfg.perturb import image_key
    from fastfg.report.overlay import displayed, save_overlay
    from fastfg.targets import probabilities

    with Inputs(arguments) as inputs:
        mean, std = inputs.adapter.pixel_mean, inputs.adapter.pixel_std
        table, warned = CSVRows(inputs.out / "attributions.csv", COLUMNS), 0
        with tracker() as track:
            for batch in inputs.batches(track(f"Explaining {count(len(inputs.paths), 'image')}")):
                images = batch.images
                result = attribute(inputs.model, images, saes=inputs.saes, gate=inputs.gate, target=inputs.target)
                heat = result.heatmap((images.shape[-2], images.shape[-1]))
                probability = probabilities(result.logits)
                for i, path in enumerate(batch.paths):
                    name, warning = _output_name(table.count, path.stem), _warning(images[i], result.maps[i])
                    target, predicted = int(result.target[i]), int(probability[i].argmax())
                    np.save(inputs.out / f"{name}.npy", result.maps[i].cpu().numpy())
                    overlay = f"{name}.png" if bool(heat[i].isfinite().all()) else ""
                    if overlay:
                        save_overlay(inputs.out / overlay, displayed(images[i], mean, std), heat[i])
                    row = (path_text(path), image_key(images[i]), f"{name}.npy", overlay, target, predicted)
                    table.add([(*row, float(probability[i, target]), warning)])
                    warned += bool(warning)
        say(f"Wrote {count(table.count, 'map')} with overlays, listed in {table.path}")
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
