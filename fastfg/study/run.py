"""Run a study in one process, or in several that share its folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastfg
from fastfg.files import write_durably
from fastfg.models.fingerprint import fingerprint
from fastfg.study.config import Config
from fastfg.study.contents import command_line, contents
from fastfg.study.device import usable_device
from fastfg.study.explained import with_evidence
from fastfg.study.judging import COLUMNS, Judging
from fastfg.study.prepare import Parts, prepare
from fastfg.study.processes import place
from fastfg.study.protocol import run_protocol
from fastfg.study.store import Store
from fastfg.study.telling import Say, Track

CONFIG = "config.json"


def run_study(config: Config, say: Say, track: Track, write: bool = True) -> Path | None:
    """Do what is missing of a study, with the other processes that work on its folder, and write its report.

    Args:
        say: prints a line. track: takes the title of a long step and returns a progress callback.
        write: whether this process writes the tables and the report.

    Returns the report, or None without ``write``.
    """
    device = device_of(config)
    if device.type == "cpu":
        torch.set_num_threads(config.run.threads)
    out = config.run.out
    parts = prepare(config, device, say, track)
    splits = dict.fromkeys(parts.training, "train")
    splits |= dict(zip(parts.images.index, parts.images["split"], strict=True))
    recipe = _recipe(config, parts, device)
    store = Store(out / "scores", columns=COLUMNS, recipe=recipe, failed=parts.unread, splits=splits, say=say)
    judging = Judging(config, parts, store, track)
    outcome = run_protocol(judging, say)
    say(f"This process ran {judging.forwards:,} perturbed forwards; the rest was there, or others did it")
    if not write:
        return None
    write_durably(out / CONFIG, config.model_dump_json(indent=2).encode())  # of what the folder holds: none refused it
    from fastfg.report.page import write_report

    made = contents(judging, outcome, command_line(), track)
    made = with_evidence(judging, outcome, made, track)
    for line in (
        (claim := made.claims[0]).sentence,
        *(f"  {'yes' if c.holds else 'no '}  {c.text}: {c.detail}" for c in claim.conditions),
    ):
        say(line)
    return write_report(out, made)


def forget_failures(config: Config) -> None:
    """Let images that could not be read be tried again. No other process may work on the folder."""
    Store(config.run.out / "scores", columns=COLUMNS).forget_failures()


def device_of(config: Config) -> torch.device:
    """The device of this process: with ``auto``, the GPU of its local rank, or the CPU.

    Raises ValueError for one that torch cannot use here.
    """
    if config.run.device != "auto":
        return usable_device("run.device", config.run.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place().local_rank % torch.cuda.device_count())


def default_processes(config: Config) -> int:
    """One process per GPU; on a CPU, as many as have ``threads`` cores each."""
    if device_of(config).type == "cuda":
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // config.run.threads)


@contextmanager
def helpers(n: int, arguments: list[str], logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``n`` more processes that run ``fastfg`` with ``arguments``; their output goes to ``logs``.

    They end with the block. One that dies leaves its work to the others.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(1, n + 1):
            environment = os.environ | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n + 1)}
            with (logs / f"process-{number}.log").open("wb") as log:
                command = [sys.executable, "-m", "fastfg", *arguments]
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()


def _recipe(config: Config, parts: Parts, device: torch.device) -> dict[str, Any]:
    """What the scores depend on beside images, variants and measures. Another one needs another folder."""
    on_cpu = {"run.threads": config.run.threads} if device.type == "cpu" else {}
    return {
        "fastfg": fastfg.__version__,
        "weights": fingerprint(parts.model.model),
        "transform": _does(parts.transform),
        "model.target": config.model.target,
        "run.seed": config.run.seed,
        "run.unit": config.run.unit,
        "run.device": device.type,
    } | on_cpu


def _does(transform: Callable[[Image.Image], torch.Tensor]) -> str:
    """A hash of what ``transform`` makes of a fixed picture: two programs that do the same have the same."""
    values = np.random.default_rng(0).integers(0, 256, (260, 300, 3), np.uint8)
    found = transform(Image.fromarray(values))
    return hashlib.sha256(f"{list(found.shape)}".encode() + found.contiguous().numpy().tobytes()).hexdigest()
