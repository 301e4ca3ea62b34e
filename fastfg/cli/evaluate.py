"""``fastfg evaluate``: how faithful the maps of a folder's images are, vanilla and gated side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastfg.cli.console import add_command, console, say, tracker


def add(commands: Any) -> None:
    from fastfg.cli.model import add_model_arguments
    from fastfg.perturb.fills import FILLS

    command = add_command(commands, "evaluate", run, "Judge the maps of a folder's images by three metrics.")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of images, searched to the bottom")
    add_model_arguments(command)
    command.add_argument("--baseline", choices=FILLS, default="mean", help="what removed patches are filled with")
    command.add_argument("--patches-per-step", type=int, default=1, help="of Pixel Flipping")
    command.add_argument("--seed", type=int, default=0, help="of all that is random")


def run(arguments: argparse.Namespace) -> None:
    import pandas as pd
    from rich.markdown import Markdown

    from fastfg.cli.model import Job
    from fastfg.report import markdown_table
    from fastfg.study import compare_batch, summarize
    from fastfg.types import Gate

    job = Job(arguments, [arguments.folder])
    gates: dict[str, Gate | None] = {"vanilla": None}
    if job.gate is not None:
        gates["gated"] = job.gate
    scores, errors = [], []
    with tracker() as track:
        for batch in job.batches(track(f"Judging {len(job.paths)} images x {len(gates)}")):
            found = compare_batch(
                job.model,
                batch.images,
                gates=gates,
                saes=job.saes,
                target=job.target,
                keys=[str(path.relative_to(arguments.folder)) for path in batch.paths],
                baseline=arguments.baseline,
                seed=arguments.seed,
                pixel_flipping={"patches_per_step": arguments.patches_per_step},
            )
            scores.append(found.scores)
            errors.append(found.errors)
    problem = job.write_errors()
    if not scores:
        raise ValueError(f"FOLDER: expected at least one readable image, got none. {problem}")
    table = pd.concat(scores, ignore_index=True)
    table.to_parquet(job.out / "scores.parquet", index=False)
    missing = pd.concat(errors, ignore_index=True)
    if len(missing):
        missing.to_csv(job.out / "score_errors.csv", index=False)
        say(f"{len(missing)} scores could not be computed: see {job.out / 'score_errors.csv'}")
    text = markdown_table(summarize(table))
    (job.out / "table.md").write_text(text, encoding="utf-8")
    console.print(Markdown(text))
    say(f"Wrote {job.out / 'scores.parquet'} and {job.out / 'table.md'}")
    if problem:
        say(problem)
