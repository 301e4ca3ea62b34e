"""A pytest plugin (``-p tests.ops.sanitized``): ``fastfg._C`` is the extension that ``make sanitize`` built."""

import importlib.util
import sys
from pathlib import Path

import torch  # noqa: F401  (the extension needs its libraries)

FOLDER = Path(__file__).parents[2] / "build" / "sanitize" / "fastfg"

(library,) = FOLDER.glob("_C*.so")
spec = importlib.util.spec_from_file_location("fastfg._C", library)
assert spec is not None
sys.modules["fastfg._C"] = importlib.util.module_from_spec(spec)
