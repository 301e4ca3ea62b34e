"""``fastfg report``: make the page of a folder of results."""

from __future__ import annotations

import argparse
from typing import Any

from fastfg.cli.console import add_command, file_or_folder, say

WRITES = """Reads from the folder, as fastfg evaluate wrote it:
  scores.parquet    one row per image and variant
  score_errors.csv, errors.csv, fastfg.json, if they are there

Writes to --out (by default, the folder itself):
  report.html       one page: the answer, the table, the differences, the
                    images with --maps, settings and errors. It needs no other
                    file and no network
  figures, tables   the same charts as PNG and SVG, the same tables as CSV and
                    Parquet

Example:
  fastfg evaluate photographs --model vit_base_patch16_224 \\
    --weights vit.safetensors --out out/scores
  fastfg report out/scores
"""


def add(commands: Any) -> None:
    command = add_command(commands, "report", run, "Make the page of a folder of results.", WRITES)
    command.add_argument("folder", type=file_or_folder, metavar="FOLDER", help="a folder with scores.parquet")
    command.add_argument(
        "--maps", type=file_or_folder, metavar="DIR", help="a folder of fastfg attribute, for the pictures"
    )
    command.add_argument(
        "--method", metavar="VARIANT", help="what the answer is about (default: gated, if it is there)"
    )
    command.add_argument(
        "--controls",
        nargs="+",
        metavar="VARIANT",
        help="what the method must beat beside vanilla (default: those of random, centre and edges that are there)",
    )
    command.add_argument("--out", type=file_or_folder, metavar="DIR", help="where to write (default: FOLDER)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the tests")


def run(arguments: argparse.Namespace) -> None:
    from fastfg.report import write_report
    from fastfg.study.report_folder import folder_contents

    contents = folder_contents(
        arguments.folder,
        maps=arguments.maps,
        method=arguments.method,
        controls=arguments.controls,
        seed=arguments.seed,
    )
    page = write_report(arguments.out or arguments.folder, contents)
    say(contents.claims[0].sentence)
    say(f"Wrote {page}, and the folders figures and tables beside it")
