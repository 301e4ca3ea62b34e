"""Every module of the benchmarks can be imported: most of them are run by hand only."""

import importlib
from pathlib import Path

import pytest

import bench

MODULES = [
    path.stem for path in sorted(Path(bench.__file__).parent.glob("*.py")) if path.stem not in ("__init__", "conftest")
]


@pytest.mark.parametrize("name", MODULES)
def test_import(name):
    importlib.import_module(f"bench.{name}")
