"""``fastfg attribute``: maps and overlays of image files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastfg.cli.console import add_command, say, tracker


def add(commands: Any) -> None:
    from fastfg.cli.model import add_model_arguments

    command = add_command(commands, "attribute", run, "Explain images: a map and an overlay for each.")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files or folders of them")
    add_model_arguments(command)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np
    import pandas as pd

    from fastfg.attribution.attribute import attribute
    from fastfg.cli.model import Job
    from fastfg.models import adapt
    from fastfg.report.overlay import displayed, save_overlay

    job = Job(arguments, arguments.images)
    adapter = adapt(job.model)
    rows: list[dict[str, object]] = []
    with tracker() as track:
        for batch in job.batches(track(f"Explaining {len(job.paths)} images")):
            result = attribute(job.model, batch.images, saes=job.saes, gate=job.gate, target=job.target)
            heat = result.heatmap((batch.images.shape[-2], batch.images.shape[-1]))
            prob = result.logits.softmax(-1)
            for i, path in enumerate(batch.paths):
                name = f"{len(rows):06d}-{path.stem}"  # files of different folders may share their names
                np.save(job.out / f"{name}.npy", result.maps[i].cpu().numpy())
                picture = displayed(batch.images[i], adapter.pixel_mean, adapter.pixel_std)
                save_overlay(job.out / f"{name}.png", picture, heat[i])
                target = int(result.target[i])
                rows.append({"file": str(path), "map": f"{name}.npy", "overlay": f"{name}.png", "target": target})
                rows[-1] |= {"predicted": int(prob[i].argmax()), "probability": float(prob[i, target])}
    pd.DataFrame(rows).to_csv(job.out / "attributions.csv", index=False)
    say(f"Wrote {len(rows)} maps and overlays and their list, {job.out / 'attributions.csv'}")
    if problem := job.write_errors():
        say(problem)
