"""The command line ``fastfg``: one file per command, with ``add`` for its arguments and ``run``."""

from __future__ import annotations

from collections.abc import Sequence

from fastfg import __version__
from fastfg.cli import attribute, convert_sae, data, demo, evaluate, finetune, info, report, study, train_sae
from fastfg.cli.console import USER_ERRORS, Help, Parser, complain

COMMANDS = (demo, attribute, evaluate, report, study, data, finetune, train_sae, convert_sae, info)
NOTES = """Examples:
  fastfg demo
  fastfg study init elpv
  fastfg attribute --help

Exit codes: 0 done; 1 an error in the input, or no image could be read; 2 a
wrong command line; 130 interrupted (finished work is kept)."""


def parser() -> Parser:
    """The parser of the whole command line."""
    description = "Feature-Gradient Attribution for Vision Transformers."
    top = Parser("fastfg", description=description, epilog=NOTES, formatter_class=Help)
    top.add_argument("--version", action="version", version=f"fastfg {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    The code is 0 when the command is done (images that were skipped are listed with their reasons), 1 for an error in
    the input or if no image could be read, and 130 when interrupted. Wrong arguments exit with 2. Errors caused by the
    input are printed as one line, without a traceback.
    """
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except USER_ERRORS as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted; finished work is kept")
        return 130
    return 0
