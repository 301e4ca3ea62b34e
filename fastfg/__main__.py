"""The command ``fastfg``, and ``python -m fastfg``."""

from __future__ import annotations

import io
import sys


def entry() -> None:
    """Run the command line, and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    try:
        from fastfg.cli import main  # torch takes a second or more, in which a run may be interrupted too

        code = main()
    except KeyboardInterrupt:
        print("error: interrupted before anything was begun", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    entry()
