"""``fastfg evaluate``: score how faithful the maps of images are, vanilla and gated side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import EachOnce, add_command, at_least_one, console, count, file_or_folder, say, tracker

if TYPE_CHECKING:
    import pandas as pd

    from fastfg.data import Batch
    from fastfg.study.comparison import Comparison

WRITES = """Writes to --out:
  scores.parquet    one row per image and variant (vanilla, gated where
                    --layers is given, and --methods): path, key, group
                    where --groups is given, variant, target, and one column
                    per metric
  score_errors.csv  one row per score that could not be computed: path, key,
                    variant, metric, message
  table.md          mean and standard error of each metric and variant, and
                    which differences are real
  errors.csv, windows.csv, fastfg.json: see below

--masks: the mask of images/a.jpg is DIR/a.png (any suffix and any folder in
DIR; a file without loss). Pixels above 0 are the object. A mask has the size of
its image, and goes through the same resize and crop. An image without a mask is
judged by the other metrics; score_errors.csv names it. Images in DIR itself are
not judged.
--groups: the columns are image (the file name, or more of the end of its path)
and group, such as the patient. Images of one group are tested together, as are
images with the same pixels.

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NOTES, add_input_arguments
    from fastfg.metrics.choose import DEFAULT_METRICS, METRICS, WITHOUT_MASKS
    from fastfg.perturb.fills import BASELINES
    from fastfg.types import METHODS

    command = add_command(
        commands, "evaluate", run, "Judge the maps of images by faithfulness metrics.", WRITES + NOTES
    )
    add_input_arguments(command)
    add = command.add_argument_group("metrics").add_argument
    default = list(DEFAULT_METRICS)
    masked = ", ".join(name for name in METRICS if name not in WITHOUT_MASKS)
    judged = f"what the maps are judged by: {', '.join(WITHOUT_MASKS)}; with --masks also {masked}"
    once: dict[str, Any] = {"nargs": "+", "action": EachOnce, "metavar": "NAME"}
    add("--metrics", choices=tuple(METRICS), default=default, help=judged, **once)
    others = f"explanations to judge beside vanilla and the gate: {', '.join(METHODS)}"
    add("--methods", choices=METHODS, default=[], help=others, **once)
    add("--masks", type=file_or_folder, metavar="DIR", help="folder with a mask of the object per image, by name")
    add("--groups", type=file_or_folder, metavar="FILE", help="CSV or Parquet file with the group of each image")
    add("--baseline", choices=BASELINES, default="mean", help="what removed patches are filled with")
    steps = "patches removed per step of Pixel Flipping and the other curves"
    add("--patches-per-step", type=at_least_one, default=1, metavar="N", help=steps)
    add("--seed", type=int, default=0, metavar="N", help="seed of all random draws")


def run(arguments: argparse.Namespace) -> None:
    from fastfg.cli.annotations import find_masks, read_groups
    from fastfg.cli.inputs import Inputs
    from fastfg.metrics.choose import taking
    from fastfg.study import compare_batch
    from fastfg.types import Gate

    _check_masks(arguments)
    with Inputs(arguments) as inputs:
        if arguments.masks is not None:
            inputs.leave_out(arguments.masks, "in the folder of the masks")
            inputs.masks = find_masks(arguments.masks, inputs.paths)
        groups = None if arguments.groups is None else read_groups(arguments.groups, inputs.paths)
        gates: dict[str, Gate | None] = {"vanilla": None}
        if inputs.gate is not None:
            gates["gated"] = inputs.gate
        variants = len(gates) + len(arguments.methods)
        scores: list[pd.DataFrame] = []
        errors: list[pd.DataFrame] = []
        try:
            with tracker() as track:
                title = f"Judging {count(len(inputs.paths), 'image')} x {count(variants, 'variant')}"
                for batch in inputs.batches(track(title)):
                    found = compare_batch(
                        inputs.model,
                        batch.images,
                        gates=gates,
                        methods=arguments.methods,
                        metrics=arguments.metrics,
                        saes=inputs.saes,
                        target=inputs.target,
                        groups=None if groups is None else [groups[path] for path in batch.paths],
                        baseline=arguments.baseline,
                        masks=batch.masks,
                        seed=arguments.seed,
                        **taking(arguments.metrics, patches_per_step=arguments.patches_per_step),
                    )
                    _name_masks(found.errors, batch, inputs.masks, arguments.masks)
                    named = _with_paths(found, batch.paths)
                    scores.append(named[0])
                    errors.append(named[1])
        finally:  # also after Ctrl-C or an error, so that finished scores are kept
            _write(inputs.out, scores, errors)


def _check_masks(arguments: argparse.Namespace) -> None:
    """Require --masks for the metrics that compare maps with masks, and the other way round."""
    from fastfg.metrics.choose import METRICS, WITHOUT_MASKS

    takes = [name for name in arguments.metrics if name not in WITHOUT_MASKS]
    if takes and arguments.masks is None:
        raise ValueError(f"masks: expected --masks DIR with {', '.join(takes)}, got none")
    if arguments.masks is not None and not takes:
        names = ", ".join(name for name in METRICS if name not in WITHOUT_MASKS)
        raise ValueError(f"metrics: expected one of {names} with --masks, got {', '.join(arguments.metrics)}")


def _name_masks(errors: pd.DataFrame, batch: Batch, masks: Mapping[Path, Path] | None, folder: Path) -> None:
    """Say in ``errors``, in place, that an image has no mask, in place of that its mask is empty."""
    from fastfg.metrics.localisation import EMPTY_MASK

    for i, (path, why) in enumerate(zip(batch.paths, batch.mask_errors, strict=False)):
        if why is None or masks is None:
            continue
        reason = f"mask {masks[path]}: {why}" if path in masks else f"no mask: expected {path.stem}.* in {folder}"
        errors.loc[(errors["index"] == i) & (errors["message"] == EMPTY_MASK), "message"] = reason


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
    again = int(table.drop_duplicates("path")["key"].duplicated().sum())
    if again:
        say(f"Same pixels as another image: {count(again, 'image')}; the tests count each picture once")
    if len(missing):
        say(f"Not computed: {count(len(missing), 'score')}, see {out / 'score_errors.csv'}")
