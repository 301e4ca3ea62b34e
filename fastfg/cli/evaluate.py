"""``fastfg evaluate``: score how faithful the maps of images are, vanilla and gated side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import EachOnce, add_command, at_least_one, console, count, file_or_folder, say

if TYPE_CHECKING:
    import pandas as pd

    from fastfg.cli.inputs import Inputs
    from fastfg.data import Batch
    from fastfg.study.shards import Work

# columns of the shards
STORED = {"image": "string", "target": "int64", "score": "float64", "error": "string"}

WRITES = """Writes to --out:
  scores.parquet    one row per image and variant (vanilla, gated where
                    --layers is given, and --methods): path, key, group
                    where --groups is given, variant, target, and one column
                    per metric
  score_errors.csv  one row per score that could not be computed: path, key,
                    variant, metric, message
  table.md          mean and standard error of each metric and variant, and
                    which differences are real
  config.json       the arguments, versions, and hashes of the weights
  shards, errors.csv, errors.parquet, windows.csv, fastfg.json: see below

--masks: the mask of images/a.jpg is DIR/a.png (any suffix and any folder in
DIR; a file without loss). Pixels above 0 are the object. A mask has the size of
its image, and goes through the same resize and crop. An image without a mask is
judged by the other metrics; score_errors.csv names it. Images in DIR itself are
not judged.
--groups: the columns are image (the file name, or more of the end of its path)
and group, such as the patient. Images of one group are tested together, as are
images with the same pixels. Without --masks and --groups, those of manifests
are used.

Examples:
  fastfg evaluate photographs --model vit_base_patch16_224 \\
    --weights vit.safetensors --out out/scores
  fastfg evaluate photographs --model vit_base_patch16_224 \\
    --weights vit.safetensors --saes out/saes/trained --layers 2 3 4 \\
    --metrics saco srg --out out/gated-scores

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NOTES, add_input_arguments
    from fastfg.cli.results import NOTES as RESUMING
    from fastfg.cli.results import add_result_arguments
    from fastfg.metrics.choose import DEFAULT_METRICS, METRICS, WITHOUT_MASKS
    from fastfg.perturb.fills import BASELINES
    from fastfg.types import METHODS

    command = add_command(
        commands, "evaluate", run, "Judge the maps of images by faithfulness metrics.", WRITES + RESUMING + NOTES
    )
    add_input_arguments(command)
    add = command.add_argument_group("metrics").add_argument
    default = list(DEFAULT_METRICS)
    masked = ", ".join(name for name in METRICS if name not in WITHOUT_MASKS)
    judged = f"what the maps are judged by: {', '.join(WITHOUT_MASKS)}; with masks also {masked}"
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
    add_result_arguments(command)


def run(arguments: argparse.Namespace) -> None:
    from fastfg.cli.annotations import find_masks, read_groups
    from fastfg.cli.inputs import Inputs
    from fastfg.cli.results import Results
    from fastfg.metrics.choose import WITHOUT_MASKS
    from fastfg.study.shards import Work

    inputs = Inputs(arguments)
    _check_masks(arguments, bool(inputs.listed.masks))
    if arguments.masks is not None:
        inputs.leave_out(arguments.masks, "in the folder of the masks")
        inputs.masks = find_masks(arguments.masks, inputs.paths)
    elif set(arguments.metrics) - set(WITHOUT_MASKS):
        inputs.masks = inputs.listed.masks
    groups = inputs.listed.groups_of(inputs.paths)
    if arguments.groups is not None:
        groups = read_groups(arguments.groups, inputs.paths)
    variants = ("vanilla", *(["gated"] if inputs.gate is not None else []), *arguments.methods)
    results, work = Results(arguments, inputs, STORED), Work(variants, tuple(arguments.metrics))
    results.start()
    with inputs:
        try:
            title = f"Judging {count(len(inputs.paths), 'image')} x {count(len(variants), 'variant')}"
            results.run(work, title, lambda batch, missing: _judge(arguments, inputs, batch, missing))
        finally:  # also after Ctrl-C or an error
            _write(inputs.out, *_tables(results.rows(work), work, groups))


def _judge(arguments: argparse.Namespace, inputs: Inputs, batch: Batch, work: Work) -> list[dict[str, Any]]:
    """The scores of a batch, one row per image, variant and metric."""
    from fastfg.data import path_text
    from fastfg.metrics.choose import taking
    from fastfg.study import compare_batch

    found = compare_batch(
        inputs.model,
        batch.images,
        gates={"vanilla": None} | ({"gated": inputs.gate} if "gated" in work.variants else {}),
        methods=[name for name in work.variants if name in arguments.methods],
        scored=work.variants,
        metrics=work.measures,
        saes=inputs.saes,
        target=inputs.target(batch.paths),
        baseline=arguments.baseline,
        masks=batch.masks,
        seed=arguments.seed,
        **taking(work.measures, patches_per_step=arguments.patches_per_step),
    )
    _name_masks(found.errors, batch, inputs.masks, arguments.masks)
    why = {(error[0], error.variant, error.metric): error.message for error in found.errors.itertuples(index=False)}
    names = [path_text(path) for path in batch.paths]
    return [
        {"key": names[row["index"]], "variant": row["variant"], "measure": metric, "image": row["image"]}
        | {"target": row["target"], "score": row[metric], "error": why.get((row["index"], row["variant"], metric))}
        for row in found.scores.to_dict("records")
        for metric in work.measures
    ]


def _check_masks(arguments: argparse.Namespace, listed: bool) -> None:
    """Require masks, of --masks or ``listed`` in a manifest, for the metrics that compare maps with them, and such a
    metric for --masks.
    """
    from fastfg.metrics.choose import METRICS, WITHOUT_MASKS

    takes = [name for name in arguments.metrics if name not in WITHOUT_MASKS]
    if takes and arguments.masks is None and not listed:
        raise ValueError(f"masks: expected --masks DIR, or a manifest with masks, with {', '.join(takes)}, got none")
    if arguments.masks is not None and not takes:
        names = ", ".join(name for name in METRICS if name not in WITHOUT_MASKS)
        raise ValueError(f"metrics: expected one of {names} with --masks, got {', '.join(arguments.metrics)}")


def _name_masks(errors: pd.DataFrame, batch: Batch, masks: Mapping[Path, Path] | None, folder: Path | None) -> None:
    """Say in ``errors``, in place, that an image has no mask, in place of that its mask is empty."""
    from fastfg.metrics.localisation import EMPTY_MASK

    def where(path: Path) -> str:
        return "one in its manifest" if folder is None else f"{path.stem}.* in {folder}"

    for i, (path, why) in enumerate(zip(batch.paths, batch.mask_errors, strict=False)):
        if why is None or masks is None:
            continue
        reason = f"mask {masks[path]}: {why}" if path in masks else f"no mask: expected {where(path)}"
        errors.loc[(errors["index"] == i) & (errors["message"] == EMPTY_MASK), "message"] = reason


def _tables(
    rows: Sequence[Mapping[str, Any]], work: Work, groups: Mapping[Path, str] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores with one row per image and variant, and the errors, one row per missing score."""
    import pandas as pd

    from fastfg.cli.results import by_image
    from fastfg.data import path_text

    group_of = None if groups is None else {path_text(path): group for path, group in groups.items()}
    scores = [
        {"path": path, "key": own[0]["image"]}
        | ({} if group_of is None else {"group": group_of[path]})
        | {"variant": variant, "target": own[0]["target"]}
        | {row["measure"]: row["score"] for row in own}
        for (path, variant), own in by_image(rows).items()
    ]
    errors = [
        {"path": row["key"], "key": row["image"], "variant": row["variant"], "metric": row["measure"]}
        | {"message": row["error"]}
        for row in rows
        if row["error"] is not None
    ]
    table = pd.DataFrame(scores)
    table.attrs["metrics"] = list(work.measures)
    return table, pd.DataFrame(errors)


def _write(out: Path, table: pd.DataFrame, missing: pd.DataFrame) -> None:
    """Write and show the scores. Files of an earlier run are replaced or removed."""
    from rich.markdown import Markdown

    from fastfg.files import write_durably
    from fastfg.report import markdown_table
    from fastfg.study import paired, summarize

    files = {"scores.parquet": b"", "score_errors.csv": b"", "table.md": b""}
    if len(table):
        text = markdown_table(summarize(table), paired=paired(table))
        files |= {"scores.parquet": table.to_parquet(index=False), "table.md": text.encode("utf-8")}
    if len(missing):
        files["score_errors.csv"] = missing.to_csv(index=False).encode("utf-8")
    for name, content in files.items():
        if content:
            write_durably(out / name, content)
        else:
            (out / name).unlink(missing_ok=True)
    if not len(table):
        return
    console.print(Markdown(text))
    say(f"Wrote {out / 'scores.parquet'} and {out / 'table.md'}")
    again = int(table.drop_duplicates("path")["key"].duplicated().sum())
    if again:
        say(f"Same pixels as another image: {count(again, 'image')}; the tests count each picture once")
    if len(missing):
        say(f"Not computed: {count(len(missing), 'score')}, see {out / 'score_errors.csv'}")
