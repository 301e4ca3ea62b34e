"""Mark the folders that fastfg writes to, so that a later search for images skips them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from fastfg import __version__
from fastfg.files import write_durably, write_new

MARKER = "fastfg.json"


def is_output(folder: Path) -> bool:
    """Whether fastfg wrote to ``folder``, that is, whether it contains ``fastfg.json``."""
    return os.path.isfile(folder / MARKER)  # noqa: PTH113 - False, not an error, in an unreadable folder


def make_output(folder: Path, command: str, settings: Mapping[str, object]) -> None:
    """Make ``folder`` an output folder: create it, and write ``fastfg.json`` with the command and its settings, unless
    it has one.

    Raises ValueError for a file, and for a folder that contains anything but earlier output, because the marker would
    hide the user's images there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got {folder}, which is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if is_output(folder):
        return
    if any(not path.name.startswith(".") for path in folder.iterdir()) and not is_output(folder):
        raise ValueError(
            f"out: expected a new or empty folder, or one with earlier output of fastfg, got {folder}, which holds "
            f"other files and no {MARKER}"
        )
    write_new(folder / MARKER, _marker(command, settings))


def claim(folder: Path, command: str, settings: Mapping[str, object]) -> None:
    """:func:`make_output`, and replace what ``fastfg.json`` said before."""
    make_output(folder, command, settings)
    write_durably(folder / MARKER, _marker(command, settings))


def _marker(command: str, settings: Mapping[str, object]) -> bytes:
    written = {"fastfg": __version__, "command": command, "settings": settings}
    return (json.dumps(written, indent=2, default=str) + "\n").encode("ascii")
