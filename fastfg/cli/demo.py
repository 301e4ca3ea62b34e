"""``fastfg demo``: run the method on real weights and real photographs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastfg.cli.console import add_command, at_least_one, console, file_or_folder, say, tracker


def add(commands: Any) -> None:
    summary = "Train a head and SAEs on photographs of solar cells, judge four explanations."
    command = add_command(commands, "demo", run, summary, "Example:\n  fastfg demo --images 12 --out out/demo\n")
    command.add_argument(
        "--out",
        type=file_or_folder,
        metavar="DIR",
        default=Path("out/demo"),
        help="folder for the table, figure and report",
    )
    command.add_argument(
        "--images", type=at_least_one, default=12, metavar="N", help="held-out defective cells to explain and judge"
    )
    command.add_argument(
        "--thorough",
        action="store_true",
        help="judge eight explanations by all metrics that need no masks (40 images: more than an hour on two cores)",
    )


def run(arguments: argparse.Namespace) -> None:
    from rich.markdown import Markdown

    from fastfg.data.output import claim
    from fastfg.study.demo import Settings, run_demo

    claim(arguments.out, "demo", {"images": arguments.images, "thorough": arguments.thorough})
    with tracker() as track:
        page = run_demo(arguments.out, Settings.of(arguments.images, arguments.thorough), say, track)
    console.print(Markdown((page.parent / "table.md").read_text(encoding="utf-8")))
    names = ("table.md", "scores.parquet", "figure.png", "report.html")
    say(f"Wrote {', '.join(str(page.parent / name) for name in names)}")
