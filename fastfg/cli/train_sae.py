"""``fastfg train-sae``: train the SAEs of a model's blocks on images, with the controls that they must beat."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import EachOnce, add_command, at_least_one, count, file_or_folder, say, tracker

if TYPE_CHECKING:
    from torch import Tensor

    from fastfg.cli.inputs import Inputs
    from fastfg.sae.recipe import Recipe
    from fastfg.sae.report import SAEReport
    from fastfg.study import TokenCache

KINDS = ("trained", "frozen-decoder", "soft-frozen", "frozen-encoder", "random")
COLUMNS = {  # of the table: {title: (attribute of the report, format)}
    "explained variance": ("explained_variance", ".4f"),
    "L0": ("l0", ".1f"),
    "dead": ("dead_share", ".1%"),
    "norm ratio": ("norm_ratio", ".3f"),
    "held-out tokens": ("tokens", ","),
    "steps": ("steps", ","),
}
WRITES = """Writes to --out:
  trained/layer_L   the SAE of block L: config.json and sae.safetensors, for
                    fastfg attribute --saes OUT/trained, and report.json
  KIND/layer_L      the same for each control of --kinds
  saes.csv          one row per SAE: explained variance on held-out images, L0,
                    share of dead features, ...
  tokens            the residual stream at the patches, which the SAEs are
                    trained on (or --tokens); remove it when you are done
  errors.csv, windows.csv, fastfg.json: see below

A run that was stopped goes on where it was: call it again with the same
arguments. The explained variance is 1 - sum (x - x_hat)^2 / sum (x - mean)^2
over tokens of images that were not trained on.

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NO_EXPLANATION, NOTES, add_model_arguments, add_reading_arguments

    summary = "Train TopK SAEs on the patch tokens of images, and controls beside them."
    command = add_command(commands, "train-sae", run, summary, WRITES + NOTES)
    command.set_defaults(**NO_EXPLANATION)
    add_model_arguments(command)
    add = command.add_argument_group("SAEs").add_argument
    layers: dict[str, Any] = {"dest": "blocks", "type": _blocks, "nargs": "+", "required": True, "metavar": "L"}
    add("--layers", **layers, help="0-based blocks, as in 4 6 8 or 2-10")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--expansion", type=at_least_one, default=64, metavar="N", help="features per dimension")
    size.add_argument("--features", type=at_least_one, metavar="F", help="features, instead of --expansion")
    add("--k", type=at_least_one, default=128, help="active features per token")
    add("--kinds", nargs="+", choices=KINDS, default=["trained"], action=EachOnce, help="SAEs, and controls of them")
    add = command.add_argument_group("training").add_argument
    add("--epochs", type=at_least_one, default=1, metavar="N", help="passes over the tokens")
    add("--steps", type=at_least_one, metavar="N", help="training steps, instead of --epochs")
    add("--batch-tokens", type=at_least_one, default=4096, metavar="N", help="tokens per step")
    add("--lr", type=float, default=1e-3, metavar="X", help="highest learning rate of Adam")
    add("--warm-up", type=float, default=0.05, metavar="X", help="share of the steps in which it rises")
    add("--k-aux", type=int, metavar="N", help="dead features of the auxiliary loss; default: near d / 2; 0: none")
    dead = "tokens after which an inactive feature is dead; default: one pass over the tokens, at most 10,000,000"
    add("--dead-after", type=at_least_one, metavar="N", help=dead)
    add("--held-out", type=float, default=0.1, metavar="X", help="share of the images to report on")
    groups = "CSV or Parquet with the columns image and group; no group is trained on and reported on"
    add("--groups", type=file_or_folder, metavar="FILE", help=groups)
    add("--precision", choices=("float32", "bfloat16"), help="of the encoder; default: bfloat16 on a GPU, else float32")
    add("--checkpoint-every", type=at_least_one, default=500, metavar="N", help="steps between checkpoints")
    add("--seed", type=int, default=0, metavar="N", help="of the start, the split and the order of tokens")
    add = command.add_argument_group("tokens on disk").add_argument
    add("--tokens", type=file_or_folder, metavar="DIR", help="folder of the tokens; default: OUT/tokens")
    add("--tokens-per-image", type=at_least_one, metavar="N", help="patches per image, drawn at random; default: all")
    add("--tokens-dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="of the tokens on disk")
    add("--max-gigabytes", type=float, metavar="X", help="the most that the tokens may take on disk")
    add("--buffer", type=at_least_one, default=2**18, metavar="N", help="tokens in memory that are shuffled")
    add_reading_arguments(command)


def _blocks(text: str) -> list[int]:
    """Argument type: ``4``, or ``2-10``."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise argparse.ArgumentTypeError(f"expected a block or a range of blocks, such as 4 or 2-10, got {text!r}")
    return list(range(int(found[1]), int(found[2] or found[1]) + 1))


def run(arguments: argparse.Namespace) -> None:
    from fastfg.cli.inputs import Inputs
    from fastfg.study.train_saes import train_saes

    arguments.blocks = list(dict.fromkeys(block for part in arguments.blocks for block in part))
    with Inputs(arguments) as inputs, tracker() as track:
        cache, groups = _tokens(arguments, inputs, track)
        per_epoch = round((1 - arguments.held_out) * cache.n_tokens) // arguments.batch_tokens
        recipe = _recipe(arguments, cache.width, per_epoch, inputs.device.type)
        found = train_saes(
            cache,
            arguments.out,
            recipe,
            kinds=arguments.kinds,
            held_out=arguments.held_out,
            groups=groups,
            buffer=arguments.buffer,
            device=inputs.device,
            checkpoint_every=arguments.checkpoint_every,
            track=lambda title: _progress(title, track(f"Training: {title}")),
        )
    _table(arguments.out, found)


def _tokens(
    arguments: argparse.Namespace, inputs: Inputs, track: Callable[[str], Callable[[int, int], None]]
) -> tuple[TokenCache, dict[str, str] | None]:
    """The tokens on disk, and the group of each image by its key."""
    import torch

    from fastfg.cli.annotations import read_groups
    from fastfg.perturb import image_key
    from fastfg.study import cache_tokens

    of_path = None if arguments.groups is None else read_groups(arguments.groups, inputs.paths)
    groups: dict[str, str] = {}

    def read() -> Iterator[tuple[Tensor, Sequence[str]]]:
        for batch in inputs.batches(track(f"Tokens of {count(len(inputs.paths), 'image')}")):
            keys = [image_key(image) for image in batch.images]
            for key, path in zip(keys, batch.paths, strict=True):
                if of_path is not None and groups.setdefault(key, of_path[path]) != of_path[path]:
                    raise ValueError(f"groups: expected one group for images with the same pixels, got two for {path}")
            yield batch.images, keys

    limit = arguments.max_gigabytes
    cache = cache_tokens(
        inputs.model,
        read(),
        arguments.blocks,
        arguments.out / "tokens" if arguments.tokens is None else arguments.tokens,
        tokens_per_image=arguments.tokens_per_image,
        dtype=getattr(torch, arguments.tokens_dtype),
        max_bytes=None if limit is None else round(limit * 1e9),
        seed=arguments.seed,
    )
    say(f"{cache.n_tokens:,} tokens of {count(len(cache.keys), 'image')} per block in {cache.folder}")
    return cache, None if of_path is None else groups


def _recipe(arguments: argparse.Namespace, width: int, per_epoch: int, device: str) -> Recipe:
    from fastfg.sae.recipe import Recipe

    if not per_epoch:
        raise ValueError(f"batch-tokens: expected at most the tokens to train on, got {arguments.batch_tokens}")
    near_half = 2 ** round(math.log2(width / 2))  # as in Gao et al.
    tokens = per_epoch * arguments.batch_tokens
    return Recipe(
        n_features=arguments.features or arguments.expansion * width,
        k=arguments.k,
        steps=arguments.steps or arguments.epochs * per_epoch,
        batch_size=arguments.batch_tokens,
        lr=arguments.lr,
        warm_up=arguments.warm_up,
        k_aux=near_half if arguments.k_aux is None else arguments.k_aux,
        dead_after=arguments.dead_after or min(tokens, 10_000_000),
        precision=arguments.precision or ("bfloat16" if device == "cuda" else "float32"),
        seed=arguments.seed,
    )


def _progress(title: str, bar: Callable[[int, int], None]) -> Callable[[int, int, dict[str, float]], None]:
    """Moves the bar, and prints the figures about ten times."""
    said = 0

    def progress(done: int, total: int, figures: dict[str, float]) -> None:
        nonlocal said
        bar(done, total)
        if done * 10 // total > said:
            said = done * 10 // total
            say(
                f"{title}: step {done:,} of {total:,}, explained variance {figures['explained_variance']:.4f}, L0 "
                f"{figures['l0']:.1f}, dead {figures['dead_share']:.1%}, {figures['tokens_per_second']:,.0f} tokens/s"
            )

    return progress


def _table(out: Path, found: dict[tuple[str, int], SAEReport]) -> None:
    """Print the reports side by side, and write ``saes.csv``."""
    from rich.table import Table

    from fastfg.cli.console import console
    from fastfg.cli.inputs import CSVRows

    names = list(asdict(next(iter(found.values()))))
    rows = CSVRows(out / "saes.csv", ("kind", "layer", *names))
    rows.add((kind, layer, *asdict(report).values()) for (kind, layer), report in found.items())
    table = Table("block", "SAE", *COLUMNS, box=None)
    for column in table.columns[:2]:
        column.no_wrap = True
    for (kind, layer), report in sorted(found.items(), key=lambda item: (item[0][1], KINDS.index(item[0][0]))):
        table.add_row(str(layer), kind, *(format(getattr(report, name), how) for name, how in COLUMNS.values()))
    console.print(table)
    first, _ = next(iter(found))
    layers = " ".join(str(layer) for kind, layer in found if kind == first)
    say(f"To use them: fastfg attribute IMAGES ... --saes {out / first} --layers {layers}")
