"""Arguments, progress bars and messages, the same for every command."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LOG_SECONDS = 30.0  # between lines of progress in a log
console = Console(highlight=False, emoji=False)

# Errors that bad input raises; each is shown as one line. Any other error is a bug and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError)


class Parser(argparse.ArgumentParser):
    """A parser that prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows the defaults and keeps the line breaks of descriptions."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None] | None, summary: str, notes: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand; ``run`` is None for one that has subcommands of its own. ``summary`` is one line, and ``notes``
    follow the arguments in the help."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=notes, formatter_class=Help
    )
    command.set_defaults(run=run, command=name)
    return command


def at_least_one(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """Argument type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def share(text: str) -> float:
    """Argument type: a number between 0 and 1."""
    number = above_zero(text)
    if number >= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return number


def share_or_all(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def part(text: str) -> tuple[int, int]:
    """Argument type: ``2/4``, the second of four parts."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected a part I/N with I from 1 to N, such as 1/4, got {text!r}")
    return int(found[1]), int(found[2])


class EachOnce(argparse.Action):
    """Takes values none of which is given twice."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        twice = next((value for n, value in enumerate(values) if value in values[:n]), None)
        if twice is not None:
            raise argparse.ArgumentError(self, f"expected each name once, got {twice!r} twice")
        setattr(namespace, self.dest, values)


def file_or_folder(text: str) -> Path:
    """Argument type: the path of a file or folder. ``~`` is the user's folder, also where no shell has replaced it, as
    in ``--out=~/maps``. An empty text would mean the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file or folder, got ''")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - which leaves a name such as ~$a.png as it is


def printable(text: str) -> str:
    """``text`` as one line: line breaks and unprintable characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(number: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say(text: str) -> None:
    """Print one line."""
    console.print(printable(text), soft_wrap=True, markup=False)


def complain(text: str) -> None:
    """Print an error to stderr, as one line."""
    line = escape(printable(" ".join(text.split())))
    Console(stderr=True, highlight=False, emoji=False).print("[red]error:[/red]", line, soft_wrap=True)


class _Rate(ProgressColumn):
    """How many per second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.3g}/s")


@contextmanager
def tracker() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yields ``track(title) -> progress(done, total)``, with one progress bar per title.

    Without a terminal, progress is a line when it begins, about every 30 seconds, and at the end.
    """
    if not console.is_terminal:
        yield _Lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def track(title: str) -> Callable[[int, int], None]:
            bar = bars.add_task(escape(title), total=None)
            return lambda done, total: bars.update(bar, completed=done, total=total)

        yield track


class _Lines:
    """Progress as lines of a log."""

    def __init__(self, title: str) -> None:
        self.title, self.begin, self.said, self.ended = title, time.monotonic(), -math.inf, False
        self.first: tuple[int, float] | None = None  # what was done at the first call, and when

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:  # work of an earlier run does not count for the rate
            self.first = (done, now)
        if self.ended or (done < total and now - self.said < LOG_SECONDS):
            return
        self.said, self.ended = now, done >= total
        text = f"{self.title}: {done:,} of {total:,}"
        if self.ended:
            text += f" in {_clock(now - self.begin)}"
        if done > self.first[0]:
            rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
            text += f", {rate:.3g} per second"
            text += "" if self.ended else f", {_clock((total - done) / rate)} left"
        say(text)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
