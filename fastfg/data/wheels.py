"""Find files of an installed wheel without importing its package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def wheel_file(requirement: str, path: str) -> Path:
    """The file ``path`` of the installed wheel of ``requirement`` ("name==version").

    Raises FileNotFoundError with the install command if it is missing.
    """
    name = requirement.split("==")[0]
    try:
        found = Path(str(importlib.metadata.distribution(name).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise FileNotFoundError(f"{path} of {name} is not installed: pip install --no-deps {requirement}")
    return found
