"""``python -m fastfg.cli``."""

from fastfg.cli import entry

entry()
