"""Progress bars and messages, the same for every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)

# What bad input raises: shown as one line. Anything else is a bug, and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError)


class _ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], description: str
) -> argparse.ArgumentParser:
    """A subcommand whose help shows its defaults."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description, formatter_class=_ShowDefaults
    )
    command.set_defaults(run=run)
    return command


def say(text: str) -> None:
    """Print one line, as it is."""
    console.print(escape(text), soft_wrap=True)


def complain(text: str) -> None:
    """Print an error to stderr."""
    Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)


@contextmanager
def tracker() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yields ``track(title) -> progress(done, total)``: a bar for each title."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def track(title: str) -> Callable[[int, int], None]:
            bar = bars.add_task(escape(title), total=None)
            return lambda done, total: bars.update(bar, completed=done, total=total)

        yield track
