"""``fastfg evaluate``: score how faithful the maps of images are, vanilla and gated side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import add_command, at_least_one, console, count, say, tracker

if TYPE_CHECKING:
    import pandas as pd

    from fastfg.study.comparison import Comparison

WRITES = """Writes to --out:
  scores.parquet    one row per image and variant (vanilla, gated where
                    --layers is given, and --methods): path, key, variant,
                    target, and one column per metric
  score_errors.csv  one row per score that could not be computed: path, key,
                    variant, metric, message
  table.md          mean and standard error of each metric and variant, and
                    which differences are real
  errors.csv, windows.csv, fastfg.json: see below

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NOTES, add_input_arguments
    from fastfg.metrics.choose import DEFAULT_METRICS, WITHOUT_MASKS
    from fastfg.perturb.fills import BASELINES
    from fastfg.types import METHODS

    command = add_command(
        commands, "evaluate", run, "Judge the maps of images by faithfulness metrics.", WRITES + NOTES
    )
    add_input_arguments(command)
    add = command.add_argument_group("metrics").add_argument
    default = list(DEFAULT_METRICS)
    judged = f"what the maps are judged by: {', '.join(WITHOUT_MASKS)}"
    add("--metrics", nargs="+", choices=WITHOUT_MASKS, default=default, metavar="NAME", help=judged)
    others = f"explanations to judge beside vanilla and the gate: {', '.join(METHODS)}"
    add("--methods", nargs="+", choices=METHODS, default=[], metavar="NAME", help=others)
    add("--baseline", choices=BASELINES, default="mean", help="what removed patches are filled with")
    steps = "patches removed per step of Pixel Flipping and the other curves"
    add("--patches-per-step", type=at_least_one, default=1, metavar="N", help=steps)
    add("--seed", type=int, default=0, metavar="N", help="seed of all random draws")


def run(arguments: argparse.Namespace) -> None:
    from fastfg.cli.inputs import Inputs
    from fastfg.metrics.choose import taking
    from fastfg.study import compare_batch
    from fastfg.types import Gate

    with Inputs(arguments) as inputs:
        gates: dict[str, Gate | None] = {"vanilla": None}
        if inputs.gate is not None:
            gates["gated"] = inputs.gate
        scores: list[pd.DataFrame] = []
        errors: list[pd.DataFrame] = []
        try:
            with tracker() as track:
                for batch in inputs.batches(track(f"Judging {count(len(inputs.paths), 'image')} x {len(gates)}")):
                    found = compare_batch(
                        inputs.model,
                        batch.images,
                        gates=gates,
                        methods=arguments.methods,
                        metrics=arguments.metrics,
                        saes=inputs.saes,
                        target=inputs.target,
                        baseline=arguments.baseline,
                        seed=arguments.seed,
                        **taking(arguments.metrics, patches_per_step=arguments.patches_per_step),
                    )
                    named = _with_paths(found, batch.paths)
                    scores.append(named[0])
                    errors.append(named[1])
        finally:  # also after Ctrl-C or an error, so that finished scores are kept
            _write(inputs.out, scores, errors)


def _with_paths(found: Comparison, paths: Sequence[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and errors of a batch, with the columns ``path`` and ``key`` instead of the position in the batch."""
    from fastfg.data import path_text

    names = [path_text(path) for path in paths]
    tables = []
    for table in (found.scores, found.errors):
        named = table.rename(columns={"index": "path", "image": "key"})
        tables.append(named.assign(path=[names[i] for i in table["index"]]))
    return tables[0], tables[1]


def _write(out: Path, scores: Sequence[pd.DataFrame], errors: Sequence[pd.DataFrame]) -> None:
    """Write and show the scores. Files of an earlier run are removed."""
    import pandas as pd
    from rich.markdown import Markdown

    from fastfg.report import markdown_table
    from fastfg.study import paired, summarize

    for name in ("scores.parquet", "score_errors.csv", "table.md"):
        (out / name).unlink(missing_ok=True)
    if not scores:
        return
    table, missing = pd.concat(scores, ignore_index=True), pd.concat(errors, ignore_index=True)
    text = markdown_table(summarize(table), paired=paired(table))
    table.to_parquet(out / "scores.parquet", index=False)
    (out / "table.md").write_text(text, encoding="utf-8")
    if len(missing):
        missing.to_csv(out / "score_errors.csv", index=False)
    console.print(Markdown(text))
    say(f"Wrote {out / 'scores.parquet'} and {out / 'table.md'}")
    if len(missing):
        say(f"Not computed: {count(len(missing), 'score')}, see {out / 'score_errors.csv'}")
