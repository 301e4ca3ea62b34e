"""How long runs tell what they do: lines, and progress by title."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]  # prints a line
Track = Callable[[str], Callable[[int, int], None]]  # takes the title of a long step, returns progress(done, total)
