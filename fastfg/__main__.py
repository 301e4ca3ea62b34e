"""``python -m fastfg``."""

from fastfg.cli import entry

entry()
