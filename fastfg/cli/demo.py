"""``fastfg demo``: the main job on real weights and real photographs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastfg.cli.console import add_command, console, say, tracker


def add(commands: Any) -> None:
    command = add_command(
        commands, "demo", run, "Train a head and SAEs on solar cells and judge four ways of explaining the defects."
    )
    command.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the table, figure and report")
    command.add_argument("--images", type=int, default=12, help="held-out defective cells to explain and judge")


def run(arguments: argparse.Namespace) -> None:
    from rich.markdown import Markdown

    from fastfg.study.demo import Settings, run_demo

    with tracker() as track:
        page = run_demo(arguments.out, Settings(explained=arguments.images), say, track)
    console.print(Markdown((page.parent / "table.md").read_text(encoding="utf-8")))
    names = ("table.md", "scores.parquet", "figure.png", "report.html")
    say(f"Wrote {', '.join(str(page.parent / name) for name in names)}")
