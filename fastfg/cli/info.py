"""``fastfg info``: show versions, devices, and which backend can run which op, or what an SAE is."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

from fastfg.cli import convert_sae
from fastfg.cli.console import add_command, console, file_or_folder, say

OPTIONAL = ("timm", "transformers", "torchvision", "vit-prisma", "triton", "matplotlib", "pandas", "scipy")

EXAMPLES = """Examples:
  fastfg info
  fastfg info --sae out/saes/trained
"""


def add(commands: Any) -> None:
    summary = "Show versions, devices and which backends can run each op; or show an SAE."
    command = add_command(commands, "info", run, summary, EXAMPLES)
    help = "show what this SAE is instead: its format, where it plugs in, its norms and thresholds"
    command.add_argument("--sae", type=file_or_folder, metavar="PATH", help=help)
    convert_sae.add_overrides(command)


def run(arguments: argparse.Namespace) -> None:
    given = convert_sae.overrides(arguments)
    if arguments.sae is not None:
        convert_sae.show(arguments.sae, given)
        return
    if given:
        raise ValueError(f"{next(iter(given))}: expected it with --sae PATH only, got it without")
    import torch
    from rich.table import Table

    import fastfg
    from fastfg.ops.dispatch import BACKENDS, OPS, why_not

    say(f"fastfg {fastfg.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"devices: cpu ({torch.get_num_threads()} threads){''.join(f', {name}' for name in gpus)}")
    say("libraries: " + ", ".join(f"{name} {_version(name)}" for name in OPTIONAL))
    table = Table("op", *BACKENDS, title="Backends", title_justify="left")
    for op in OPS:
        table.add_row(op, *(why_not(op, backend) or "yes" for backend in BACKENDS))
    console.print(table)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
