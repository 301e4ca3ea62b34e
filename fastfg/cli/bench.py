"""``fastfg bench report``: tables from the lines that ``pytest bench/ --save`` has written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastfg.cli.console import add_command, say


def add(commands: Any) -> None:
    bench = commands.add_parser("bench", help="Tables from the benchmarks' results.")
    nested = bench.add_subparsers(required=True, metavar="COMMAND")
    command = add_command(nested, "report", run, "Write Markdown tables from the benchmarks' JSON lines.")
    command.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of <device>/<suite>.jsonl")
    command.add_argument("--out", type=Path, help="file for the tables; they are printed where none is given")
    command.add_argument("--short", action="store_true", help="one table for all of it, a row a case")
    command.add_argument(
        "--into",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="Markdown files whose tables between <!-- bench:[DEVICE/]SUITE [KEY=VALUE ...] --> and <!-- /bench --> "
        "are to be rewritten",
    )


def run(arguments: argparse.Namespace) -> None:
    from fastfg.report.bench import read_lines, report, summary, update

    lines = read_lines(arguments.results)
    told = summary if arguments.short else report
    for file in arguments.into:
        say(f"{file}: {update(file, lines)} places up to date")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(told(lines), encoding="utf-8")
        say(f"Wrote {arguments.out}")
    elif not arguments.into:
        say(told(lines))
