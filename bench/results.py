"""One JSON line per finished benchmark, with the commit, device and versions."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastfg

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """``cpu``, or the name of the GPU with dashes; the results are in a folder of this name."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name().replace(" ", "-")


def commit() -> str:
    """The commit, with "+" if tracked files differ from it. FASTFG_COMMIT gives it if there is no git history."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    if "FASTFG_COMMIT" in os.environ:
        return os.environ["FASTFG_COMMIT"]
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/bench/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def measured_on(device: str) -> dict[str, Any]:
    return {
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastfg": fastfg.__version__,
        "threads": torch.get_num_threads(),
    }


def times(seconds: Sequence[float]) -> dict[str, float | int]:
    """The median, the 20th and 80th percentiles and the number of rounds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": fifths[0], "p80": fifths[-1], "rounds": len(seconds)}


def append(root: Path, device: str, line: dict[str, Any]) -> Path:
    """Append ``line`` to the file of its suite in ``root``; returns the file."""
    file = root / device_name(device) / f"{line['name']}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line | measured_on(device) | {"date": now}) + "\n")
    return file


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
