"""``fastfg data prepare``: the manifest of a data set as it was published, or of a folder of classes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.cli.console import add_command, at_least_one, console, count, file_or_folder, say
from fastfg.files import write_durably

if TYPE_CHECKING:
    import pandas as pd

    from fastfg.data.manifest import Manifest

INSTALLED = "installed"
WRITES = """Writes to DST:
  manifest.parquet  one row per image: key, path, label, split (train, validation
                    or test), group, mask, sha256
  dropped.csv       files that are not in it, with the reason
Images stay where they are, unless --copy is given. Files with the same content
are one image, so that no image is in two splits.

Examples:
  {example}
"""
EXAMPLES = {
    "elpv": "fastfg data prepare elpv installed data/elpv",
    "covid-qu-ex": "fastfg data prepare covid-qu-ex archive data/covid-qu-ex",
    "hyperkvasir": "fastfg data prepare hyperkvasir hyper-kvasir data/hyperkvasir",
    "imagenet": "fastfg data prepare imagenet imagenet data/imagenet --test 10000",
    "folder": "fastfg data prepare folder photos data/photos --validation 0.2 --test 0.2",
}
TITLES = {
    "elpv": "ELPV: 2,624 electroluminescence photographs of solar cells.",
    "covid-qu-ex": "COVID-QU-Ex: 33,920 chest X-rays with masks (Kaggle, by anasmohammedtahir).",
    "hyperkvasir": "HyperKvasir: anatomical landmarks, or segmented polyps (datasets.simula.no/hyper-kvasir).",
    "imagenet": "ImageNet: a subset of the ILSVRC 2012 validation images (image-net.org).",
    "folder": "A folder with a folder per class, or train, val and test with them inside.",
}


def add(commands: Any) -> None:
    epilog = "Example:\n  " + EXAMPLES["elpv"] + "\n"
    command = add_command(commands, "data", None, "Prepare data sets: make the manifest of their images.", epilog)
    actions = command.add_subparsers(required=True, metavar="ACTION")
    summary = "Make the manifest of a published data set, or of a folder of classes."
    prepare = add_command(actions, "prepare", None, summary, epilog)
    layouts = prepare.add_subparsers(required=True, metavar="LAYOUT")
    for name, title in TITLES.items():
        one = add_command(layouts, name, run, title, WRITES.format(example=EXAMPLES[name]))
        one.set_defaults(command="data", layout=name)
        source = "the published files" if name != "folder" else "the folder of the classes"
        more = f", or {INSTALLED}: the wheel elpv-dataset" if name == "elpv" else ""
        one.add_argument("source", type=file_or_folder, metavar="SRC", help=source + more)
        one.add_argument("target", type=file_or_folder, metavar="DST", help="folder for the manifest")
        _add_options(one, name)
        one.add_argument("--csv", action="store_true", help="write manifest.csv instead of manifest.parquet")
        one.add_argument("--copy", action="store_true", help="copy images and masks to DST, named by their keys")
        text = "a manifest; drop validation and test images that it trains on"
        one.add_argument("--not-trained", type=file_or_folder, metavar="FILE", help=text)


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    add = command.add_argument
    if name in ("hyperkvasir", "folder"):
        for split in ("validation", "test"):
            add(f"--{split}", type=float, default=0.15, metavar="X", help=f"share of the images for {split}")
    if name in ("elpv", "imagenet"):
        defaults = (
            {"train": 0, "validation": 1000, "test": 10000}
            if name == "imagenet"
            else dict.fromkeys(("train", "validation", "test"))
        )
        for split, default in defaults.items():
            more = "" if default is not None else "; without it, all"
            add(f"--{split}", type=_zero_or_more, default=default, metavar="N", help=f"images for {split}{more}")
    if name == "covid-qu-ex":
        add("--part", choices=("lung", "infection"), default="lung", help="of the archive")
        add("--mask", choices=("lung masks", "infection masks"), help="default: the masks that the part is named after")
    if name == "hyperkvasir":
        add("--part", choices=("landmarks", "polyps"), default="landmarks", help="of the archive")
    if name == "folder":
        text = "regular expression; its first group, in a file's path below SRC, names what belongs together"
        add("--group-pattern", metavar="REGEX", help=text)
    if name != "covid-qu-ex":  # whose splits are the archive's
        add("--seed", type=int, default=2012 if name == "imagenet" else 0, metavar="N", help="of what is drawn")


def _zero_or_more(text: str) -> int:
    return 0 if text == "0" else at_least_one(text)


def run(arguments: argparse.Namespace) -> None:
    from fastfg.data.manifest import class_counts, read_manifest, write_manifest
    from fastfg.data.splits import not_trained_on

    made = _manifest(arguments)
    table = made.table
    if arguments.not_trained is not None:
        table = not_trained_on(table, read_manifest(arguments.not_trained, check_files=False))
        say(f"Dropped {count(len(made.table) - len(table), 'image')} that {arguments.not_trained} trains on")
    target: Path = arguments.target
    if target.exists() and not target.is_dir():
        raise ValueError(f"DST: expected a folder, got {target}, which is a file")
    target.mkdir(parents=True, exist_ok=True)
    if arguments.copy:
        table = _copied(table, target)
    file = write_manifest(table, target / ("manifest.csv" if arguments.csv else "manifest.parquet"))
    write_durably(target / "dropped.csv", made.dropped.to_csv(index=False).encode())
    _show(class_counts(table))
    groups = table.loc[table["group"] != "", "group"].nunique()
    said = f"{count(groups, 'group')}, none in two splits"
    if not groups:
        said = "no groups: whether the splits keep patients, or whatever belongs together, apart is not known"
    masks = int((table["mask"] != "").sum())
    say(f"{count(len(table), 'image')}, {count(masks, 'mask')}; {said}")
    if len(made.dropped):
        say(f"Not in the manifest: {count(len(made.dropped), 'path')}, see {target / 'dropped.csv'}")
    say(f"Wrote {file}")


def _manifest(arguments: argparse.Namespace) -> Manifest:
    from fastfg.data.layouts import covid_qu_ex, elpv, hyperkvasir, imagenet
    from fastfg.data.splits import from_folder

    given, source = vars(arguments), arguments.source
    names = ("part", "mask", "train", "validation", "test", "seed")
    options = {name: given[name] for name in names if name in given}
    if arguments.layout == "elpv":
        return elpv.elpv(None if str(source) == INSTALLED else source, **options)
    if arguments.layout == "covid-qu-ex":
        return covid_qu_ex.prepare(source, **options)
    if arguments.layout == "hyperkvasir":
        masks = arguments.target / "masks" if arguments.part == "polyps" else None
        return hyperkvasir.prepare(source, masks=masks, **options)
    if arguments.layout == "imagenet":
        return imagenet.prepare(source, **options)
    return from_folder(source, group=_group(arguments.group_pattern, source), **options)


def _group(pattern: str | None, source: Path) -> Any:
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"group-pattern: expected a regular expression, got {pattern!r}: {error}") from None
    if expression.groups < 1:
        raise ValueError(f"group-pattern: expected a group in parentheses, got {pattern!r}")

    def group(path: Path) -> str:
        found = expression.search(path.relative_to(source).as_posix())
        return (found[1] or "") if found else ""

    return group


def _copied(table: pd.DataFrame, target: Path) -> pd.DataFrame:
    """The manifest with the images and masks copied below ``target``."""
    table = table.copy()
    for column, folder in (("path", "images"), ("mask", "masks")):
        (target / folder).mkdir(exist_ok=True)
        copies = []
        for key, name in zip(table["key"], table[column], strict=True):
            copy = target / folder / f"{key}{Path(name).suffix.lower()}"
            if name and not (copy.exists() and copy.samefile(name)):
                write_durably(copy, Path(name).read_bytes())
            copies.append(str(copy) if name else "")
        table[column] = copies
    return table


def _show(counts: pd.DataFrame, most: int = 20) -> None:
    """Print the images per class and split."""
    from rich.table import Table

    table = Table("label", *counts.columns, box=None)
    for label, row in counts.head(most).iterrows():
        table.add_row(str(label), *(f"{n:,}" for n in row))
    console.print(table, markup=False)
    if len(counts) > most:
        say(f"... and {len(counts) - most} more labels")
    used = [split for split in counts if counts[split].sum()]
    empty = [f"{label} in {split}" for split in used for label in counts.index[counts[split] == 0]]
    if empty:
        say(f"Without images: {', '.join(empty[:6])}{' and others' if len(empty) > 6 else ''}")
