"""The docstring examples of every module run."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import fastfg
from fastfg.models.timm import import_timm

import_timm()


def sources():
    """{module name: file} for every module that Python finds in fastfg."""

    def broken(name):
        raise ImportError(f"{name} can't be imported, so its modules can't be listed")

    names = ["fastfg", *(module.name for module in pkgutil.walk_packages(fastfg.__path__, "fastfg.", broken))]
    files = {name: Path(importlib.util.find_spec(name).origin) for name in names}
    return {name: file for name, file in files.items() if file.suffix == ".py"}


SOURCES = sources()
EXAMPLES = [name for name, file in SOURCES.items() if ">>>" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_no_file_is_left_out():
    """A folder without ``__init__.py`` would be left out."""
    assert set(Path(fastfg.__file__).parent.rglob("*.py")) <= set(SOURCES.values())
    assert {"fastfg.attribution.attribute", "fastfg.metrics.evaluate", "fastfg.types"} <= set(EXAMPLES)
