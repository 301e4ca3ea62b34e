"""The versions that a result depends on."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "timm", "numpy", "pandas", "scipy")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """{name: version} of fastfg, Python and those of ``packages`` that are installed."""
    from fastfg import __version__

    found = {"fastfg": __version__, "Python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
