"""``fastfg train-sae``: train the SAEs of a model's blocks on images, with the controls that they must beat."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import (
    EachOnce,
    above_zero,
    add_command,
    at_least_one,
    count,
    file_or_folder,
    say,
    share,
    tracker,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fastfg.cli.inputs import Inputs
    from fastfg.sae.recipe import Recipe
    from fastfg.sae.report import SAEReport
    from fastfg.study import TokenCache

EXPANSION, EPOCHS = 64, 1  # defaults; argparse would not see that its own default was given beside what excludes it
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a number on disk
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
                    share of dead features, ...; of soft-frozen also the share
                    of dictionary rows at the limit (0: it is no control)
  tokens            the residual stream at the patches, which the SAEs are
                    trained on (or --tokens); remove it when you are done
  errors.csv, windows.csv, fastfg.json: see below

A run that was stopped goes on where it was: call it again with the same
arguments. Only images that are named now are used, also where the folder of
tokens holds others. The explained variance is 1 - sum (x - x_hat)^2 / sum (x - mean)^2
over tokens of images that were not trained on.

Example:
  fastfg train-sae photographs --model vit_base_patch16_224 \\
    --weights vit.safetensors --layers 2 3 4 --out out/saes

"""


def add(commands: Any) -> None:
    from fastfg.cli.inputs import NO_EXPLANATION, NOTES, add_model_arguments, add_reading_arguments
    from fastfg.sae.recipe import ACTIVATIONS, KINDS

    summary = "Train TopK SAEs on the patch tokens of images, and controls beside them."
    command = add_command(commands, "train-sae", run, summary, WRITES + NOTES)
    command.set_defaults(**NO_EXPLANATION)
    add_model_arguments(command)
    add = command.add_argument_group("SAEs").add_argument
    layers: dict[str, Any] = {"dest": "blocks", "type": _blocks, "nargs": "+", "required": True, "metavar": "L"}
    add("--layers", **layers, help="0-based blocks, as in 4 6 8 or 2-10")
    size = command.add_mutually_exclusive_group()
    expansion = f"features per dimension (default: {EXPANSION})"
    size.add_argument("--expansion", type=at_least_one, metavar="N", help=expansion)
    size.add_argument("--features", type=at_least_one, metavar="F", help="features, instead of --expansion")
    add("--k", type=at_least_one, default=128, help="active features per token (batch_topk: in the mean over a batch)")
    add("--activation", choices=ACTIVATIONS, default="topk", help="batch_topk: the K x tokens largest of each batch")
    prefixes = "Matryoshka: shares of the dictionary whose losses are added, as in 0.0625 0.125 0.25 0.5 1"
    add("--prefixes", type=float, nargs="+", default=[1.0], metavar="X", help=prefixes)
    add("--kinds", nargs="+", choices=KINDS, default=["trained"], action=EachOnce, help="SAEs, and controls of them")
    training = command.add_argument_group("training")
    length, add = training.add_mutually_exclusive_group(), training.add_argument
    length.add_argument("--epochs", type=at_least_one, metavar="N", help=f"passes over the tokens (default: {EPOCHS})")
    length.add_argument("--steps", type=at_least_one, metavar="N", help="training steps, instead of --epochs")
    add("--batch-tokens", type=at_least_one, default=4096, metavar="N", help="tokens per step")
    add("--lr", type=float, default=1e-3, metavar="X", help="highest learning rate of Adam")
    add("--warm-up", type=float, default=0.05, metavar="X", help="share of the steps in which it rises")
    add("--k-aux", type=int, metavar="N", help="dead features of the auxiliary loss; default: near d / 2; 0: none")
    dead = "tokens after which an inactive feature is dead; default: a tenth of those of the run, at most 10,000,000"
    add("--dead-after", type=at_least_one, metavar="N", help=dead)
    add("--held-out", type=share, default=0.1, metavar="X", help="share of the images, or groups, to report on")
    groups = "CSV or Parquet with the columns image and group; no group is trained on and reported on"
    add("--groups", type=file_or_folder, metavar="FILE", help=groups)
    add("--precision", choices=("float32", "bfloat16"), help="of the encoder; default: bfloat16 on a GPU, else float32")
    add("--checkpoint-every", type=at_least_one, default=500, metavar="N", help="steps between checkpoints")
    add("--seed", type=int, default=0, metavar="N", help="of the start, the split and the order of tokens")
    add = command.add_argument_group("tokens on disk").add_argument
    add("--tokens", type=file_or_folder, metavar="DIR", help="folder of the tokens; default: OUT/tokens")
    add("--tokens-per-image", type=at_least_one, metavar="N", help="patches per image, drawn at random; default: all")
    add("--tokens-dtype", choices=tuple(BYTES), default="float16", help="of the tokens on disk")
    add("--max-gigabytes", type=above_zero, metavar="X", help="the most that the tokens may take on disk")
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
    from fastfg.study.token_writer import check_batch
    from fastfg.study.train_saes import train_saes

    arguments.blocks = list(dict.fromkeys(block for part in arguments.blocks for block in part))
    if arguments.features is None:
        arguments.expansion = arguments.expansion or EXPANSION
    if arguments.steps is None:
        arguments.epochs = arguments.epochs or EPOCHS
    if arguments.buffer < 2 * arguments.batch_tokens:
        raise ValueError(f"buffer: expected at least two batches, {2 * arguments.batch_tokens}, got {arguments.buffer}")
    inputs = Inputs(arguments)
    of_path = _groups(arguments, inputs)
    _check(arguments, inputs, of_path)
    with inputs, tracker() as track:
        cache, keys, groups = _tokens(arguments, inputs, of_path, track)
        trained, held_out = cache.split(arguments.held_out, groups=groups, seed=arguments.seed, keys=keys)
        n = cache.count(trained)
        say(f"{n:,} tokens of {count(len(trained), 'image')} to train on, {count(len(held_out), 'image')} held out")
        check_batch(n, arguments.batch_tokens, _option)
        recipe = _recipe(arguments, cache.width, n // arguments.batch_tokens, inputs.device.type)
        if recipe.k_aux and recipe.dead_after >= recipe.steps * recipe.batch_size:
            say(f"No feature can be dead: --dead-after {recipe.dead_after:,} is not reached, so --k-aux does nothing")
        found = train_saes(
            cache,
            arguments.out,
            recipe,
            kinds=arguments.kinds,
            held_out=arguments.held_out,
            groups=groups,
            keys=keys,
            buffer=arguments.buffer,
            device=inputs.device,
            checkpoint_every=arguments.checkpoint_every,
            track=lambda title: _progress(title, track(f"Training: {title}")),
            say=say,
        )
    _table(found)
    _say_limits(arguments.out, found)
    _write_csv(arguments.out)


def _groups(arguments: argparse.Namespace, inputs: Inputs) -> dict[Path, str] | None:
    """{image: its group}, of --groups or the manifests; None: there are none."""
    from fastfg.cli.annotations import read_groups

    if arguments.groups is not None:
        return read_groups(arguments.groups, inputs.paths)
    return inputs.listed.groups_of(inputs.paths)


def _check(arguments: argparse.Namespace, inputs: Inputs, of_path: dict[Path, str] | None) -> None:
    """Refuse what can't be trained with this model and this number of images, before anything is written.

    Images may turn out to be unreadable or equal. So what is checked here is checked again with the tokens.
    """
    from fastfg.models.timm import preprocessing
    from fastfg.study.token_cache import on_both_sides
    from fastfg.study.token_writer import check_tokens, shape_of_tokens

    n, share = len(inputs.paths), arguments.held_out
    if not n:
        return  # Inputs says why
    n_units = n if of_path is None else len(set(of_path.values()))
    if not on_both_sides(share, n_units):
        what = "images" if of_path is None else "groups"
        raise ValueError(f"held-out: expected a share that leaves some of {n_units} {what} on both sides, got {share}")
    patches, width = shape = shape_of_tokens(inputs.adapter, preprocessing(inputs.model), arguments.blocks)
    to_train = n - round(share * n_units)
    most = check_tokens(shape, to_train, arguments.tokens_per_image, arguments.batch_tokens, _option)
    _recipe(arguments, width, most // arguments.batch_tokens, inputs.device.type)
    per_image = arguments.tokens_per_image or patches
    gigabytes = n * per_image * width * len(arguments.blocks) * BYTES[arguments.tokens_dtype] / 1e9
    if arguments.max_gigabytes is not None and gigabytes > arguments.max_gigabytes:
        given = f"more than --max-gigabytes {arguments.max_gigabytes:g}"
        say(f"The tokens of {count(n, 'image')} may take {gigabytes:.3g} GB, {given}")


def _option(argument: str) -> str:
    """What messages call an argument."""
    return argument.replace("_", "-")


def _tokens(
    arguments: argparse.Namespace,
    inputs: Inputs,
    of_path: dict[Path, str] | None,
    track: Callable[[str], Callable[[int, int], None]],
) -> tuple[TokenCache, list[str], dict[str, str] | None]:
    """The tokens on disk, the keys of the images that were read now, and the group of each by its key."""
    import torch

    from fastfg.perturb import image_key
    from fastfg.study import cache_tokens

    groups: dict[str, str] = {}
    known: list[str] = []

    def read() -> Iterator[tuple[Tensor, Sequence[str]]]:
        for batch in inputs.batches(track(f"Tokens of {count(len(inputs.paths), 'image')}")):
            keys = [image_key(image) for image in batch.images]
            known.extend(keys)
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
        say=say,
    )
    keys = list(dict.fromkeys(known))
    others = len(set(cache.keys).difference(keys))
    beside = f", beside {count(others, 'image')} that this command does not use" if others else ""
    say(f"{cache.count(keys):,} tokens of {count(len(keys), 'image')} per block in {cache.folder}{beside}")
    return cache, keys, None if of_path is None else groups


def _recipe(arguments: argparse.Namespace, width: int, per_epoch: int, device: str) -> Recipe:
    from fastfg.sae.recipe import Recipe

    near_half = 2 ** round(math.log2(width / 2))  # as in Gao et al.
    steps = arguments.steps or arguments.epochs * per_epoch
    tenth = max(arguments.batch_tokens, steps * arguments.batch_tokens // 10)
    return Recipe(
        n_features=arguments.features or arguments.expansion * width,
        k=arguments.k,
        steps=steps,
        batch_size=arguments.batch_tokens,
        lr=arguments.lr,
        warm_up=arguments.warm_up,
        k_aux=near_half if arguments.k_aux is None else arguments.k_aux,
        dead_after=arguments.dead_after or min(tenth, 10_000_000),
        precision=arguments.precision or ("bfloat16" if device == "cuda" else "float32"),
        seed=arguments.seed,
        activation=arguments.activation,
        prefixes=arguments.prefixes,
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
                f"{title}: step {done:,} of {total:,}, explained variance of the batch "
                f"{figures['explained_variance']:.4f}, L0 {figures['l0']:.1f}, dead {_known(figures['dead_share'])}, "
                f"{figures['tokens_per_second']:,.0f} tokens/s"
            )

    return progress


def _known(share: float) -> str:
    return "not known yet" if math.isnan(share) else f"{share:.1%}"


def _table(found: dict[tuple[str, int], SAEReport]) -> None:
    """Print the reports side by side."""
    from rich.table import Table

    from fastfg.cli.console import console
    from fastfg.sae.recipe import KINDS

    table = Table("block", "SAE", *COLUMNS, box=None)
    for column in table.columns[:2]:
        column.no_wrap = True
    for (kind, layer), report in sorted(found.items(), key=lambda item: (item[0][1], KINDS.index(item[0][0]))):
        table.add_row(str(layer), kind, *(format(getattr(report, name), how) for name, how in COLUMNS.values()))
    console.print(table)
    first, _ = next(iter(found))
    layers = " ".join(str(layer) for kind, layer in found if kind == first)
    say(f"To use them: fastfg attribute IMAGES ... --saes OUT/{first} --layers {layers}")


def _say_limits(out: Path, found: dict[tuple[str, int], SAEReport]) -> None:
    """Say of each soft-frozen SAE whether its limit acted: if not, it was trained like ``trained``."""
    from fastfg.files import read_json
    from fastfg.sae.controls import COSINE
    from fastfg.study.train_saes import REPORT, ROWS_AT_LIMIT

    limit = f"at the limit, a cosine of {COSINE:g} with"
    for kind, layer in found:
        share = read_json(out / kind / f"layer_{layer}" / REPORT).get(ROWS_AT_LIMIT)
        if share == 0:
            say(
                f"{kind}, block {layer}: no dictionary row was ever {limit} its start. The limit never acted: this SAE "
                "was trained like trained, and as a control it says nothing (train for longer, or compare "
                "frozen-decoder)"
            )
        elif share is not None:
            say(f"{kind}, block {layer}: {share:.1%} of the dictionary rows were {limit} their start after some step")


def _write_csv(out: Path) -> None:
    """Write ``saes.csv``: a row for each SAE in ``out``, those of earlier calls too."""
    from fastfg.cli.inputs import write_csv
    from fastfg.files import read_json
    from fastfg.sae.recipe import KINDS
    from fastfg.sae.report import SAEReport
    from fastfg.study.train_saes import REPORT, ROWS_AT_LIMIT

    rows = []
    for kind in KINDS:
        files = (out / kind).glob(f"layer_*/{REPORT}")
        found = [(int(file.parent.name.removeprefix("layer_")), read_json(file, "report")) for file in files]
        for layer, one in sorted(found, key=lambda item: item[0]):
            rows.append((kind, layer, *asdict(SAEReport.read(one["report"])).values(), one.get(ROWS_AT_LIMIT)))
    write_csv(out / "saes.csv", ("kind", "layer", *(field.name for field in fields(SAEReport)), ROWS_AT_LIMIT), rows)
