"""Examples in docstrings run."""

import doctest
import importlib

import pytest

from fastfg.models.timm import import_timm

import_timm()

MODULES = [
    "fastfg.attribution.residuals",
    "fastfg.attribution.attribute",
    "fastfg.metrics.evaluate",
    "fastfg.metrics.faithfulness_correlation",
    "fastfg.metrics.pixel_flipping",
    "fastfg.metrics.saco",
    "fastfg.models.load",
    "fastfg.sae.model",
    "fastfg.sae.train",
    "fastfg.study.comparison",
    "fastfg.types",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
