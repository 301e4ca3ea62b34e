"""What ``fastfg evaluate`` imports, loaded once for all processes of :mod:`bench.kills`, so that they start fast."""

import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import rich.markdown  # noqa: F401

import fastfg.cli.results
import fastfg.metrics
import fastfg.report
import fastfg.study  # noqa: F401
from fastfg.models.timm import import_timm

import_timm()
