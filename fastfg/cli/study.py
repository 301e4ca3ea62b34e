"""``fastfg study``: the paper's protocol on anyone's data, from a configuration file to a report."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastfg.cli.console import Help, Parser, add_command, at_least_one, console, file_or_folder, say, tracker

INIT = """Examples:
  fastfg study init elpv                   writes elpv.toml, for two cores and
                                           less than an hour
  fastfg study init elpv --full            the same study, for a GPU
  fastfg study init photographs --model vit_small_patch16_224 --weights w.pt
                                           a folder with a subfolder per class
"""
RUN = """Example:
  fastfg study run elpv.toml --dry-run     what it costs on this machine
  fastfg study run elpv.toml

A run that was stopped, or killed, goes on with the same command. Processes on
other machines may run it at the same time on a shared folder, and so may
  torchrun --nproc-per-node 4 -m fastfg study run elpv.toml
With more variants or metrics in the file, only what is new is computed.

Writes to the folder `out` of the file:
  report.html       the claim, tables, curves and images
  tables, figures   the same as CSV, Parquet, PNG and SVG
  scores            every score, as Parquet shards
  choice.json       the gate that was chosen on the validation images
  rules.json        the rule of the choice, and when it was written
  model, saes, tokens
                    what the study has trained
"""


def add(commands: Any) -> None:
    summary = "Run the paper's study on your own images: choose a gate, test it, write a report."
    example = "Example:\n  fastfg study init elpv\n  fastfg study run elpv.toml --dry-run\n"
    study = add_command(commands, "study", None, summary, example)
    parts = study.add_subparsers(required=True, metavar="init|run", parser_class=Parser)
    init = parts.add_parser("init", help="write the configuration", epilog=INIT, formatter_class=Help)
    init.set_defaults(run=_init)
    init.add_argument("what", metavar="STUDY", help="elpv, covid-qu-ex, hyperkvasir, imagenet, a manifest or a folder")
    init.add_argument("--out", type=file_or_folder, metavar="FILE", help="default: STUDY.toml")
    init.add_argument("--manifest", type=file_or_folder, metavar="FILE", help="of fastfg data prepare")
    init.add_argument("--model", metavar="NAME", help="a timm model")
    init.add_argument("--weights", type=file_or_folder, metavar="FILE", help="of the model")
    init.add_argument("--full", action="store_true", help="sizes for a GPU")
    run = parts.add_parser("run", help="run it, or go on with it", epilog=RUN, formatter_class=Help)
    run.set_defaults(run=_run)
    run.add_argument("config", type=file_or_folder, metavar="CONFIG.toml")
    again = "try images again that could not be read before"
    run.add_argument("--retry-failed", action="store_true", help=again)
    run.add_argument("--dry-run", action="store_true", help="say what it costs on this device, and run nothing")
    run.add_argument("--max-failures", type=_in_the_file, help=argparse.SUPPRESS)  # an option of other commands
    cores = "processes; without it, one per GPU, or one per core"
    run.add_argument("--processes", type=at_least_one, metavar="N", help=cores)


def _in_the_file(text: str) -> Any:
    raise argparse.ArgumentTypeError(f"expected it in the file, as max_failures = {text} below [data]")


def _init(arguments: argparse.Namespace) -> None:
    from fastfg.study.init import init

    file = init(
        os.path.expanduser(arguments.what),  # noqa: PTH111 - a name or a path
        arguments.out,
        manifest=arguments.manifest,
        model=arguments.model,
        weights=arguments.weights,
        full=arguments.full,
        say=say,
    )
    say(f"Wrote {file}. Next: fastfg study run {file} --dry-run")


def _run(arguments: argparse.Namespace) -> None:
    from fastfg.study.config import read_config
    from fastfg.study.prepare import check_paths
    from fastfg.study.processes import place
    from fastfg.study.run import default_processes, device_of, forget_failures, helpers, run_study

    world, rank, _ = place()
    config = read_config(arguments.config)
    check_paths(config)
    device = device_of(config)  # which names one that is not there
    n = arguments.processes or (default_processes(config) if world == 1 else 1)
    if arguments.dry_run:
        _show_cost(config, device, n)
        return
    if arguments.retry_failed and rank == 0:
        forget_failures(config)
    more = n - 1 if world == 1 else 0
    command = ["study", "run", str(arguments.config), "--processes", "1"]
    with helpers(more, command, config.run.out / "logs") as started, tracker() as track:
        report = run_study(config, say, track, write=rank == 0)
        failed = [number for number, process in enumerate(started, 1) if process.wait() != 0]
    for number in failed:
        say(f"Process {number} failed, and the others did its work: see {config.run.out / 'logs'}/process-{number}.log")
    if report is not None:
        say(f"Wrote {report}")


def _show_cost(config: Any, device: Any, processes: int) -> None:
    from rich.table import Table

    from fastfg.study.cost import estimate

    cost = estimate(config, device, say)
    table = Table("stage", "images", "variants", "forwards", "minutes", box=None)
    for row in cost.table.to_dict("records"):
        shown = (f"{row[name]:,}" if row[name] else "" for name in ("images", "variants", "forwards"))
        table.add_row(row["stage"], *shown, f"{row['minutes']:,.1f}")
    console.print(table)
    several = f"; in {processes}: about {_minutes(cost.minutes(processes))}, if each has a core" * (processes > 1)
    say(f"In one process: {_minutes(cost.minutes())} minutes{several}")
    say("Maps that share masks need fewer forwards than these. The report is not counted")
    say(f"Memory: about {cost.memory / 1e9:.1f} GB per process, and the SAEs")


def _minutes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
