"""The command line: one file a command, each with ``add`` (its arguments) and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastfg import __version__
from fastfg.cli import attribute, demo, evaluate, info
from fastfg.cli.console import USER_ERRORS, complain

COMMANDS = (demo, attribute, evaluate, info)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser("fastfg", description="Feature-Gradient Attribution for Vision Transformers.")
    top.add_argument("--version", action="version", version=f"fastfg {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors that the input caused are one line, without a traceback."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except USER_ERRORS as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def entry() -> None:
    """The ``fastfg`` command."""
    sys.exit(main())
