"""The results of ``attribute`` and ``evaluate``: written batch by batch, gone on with, and shared between processes."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fastfg import __version__
from fastfg.cli.console import part, say, share_or_all, tracker
from fastfg.cli.inputs import Inputs
from fastfg.data import Batch, path_text
from fastfg.data.output import make_output
from fastfg.files import read_json, write_durably
from fastfg.models.fingerprint import fingerprint
from fastfg.study.shards import Failure, Unit, Work
from fastfg.study.store import Store
from fastfg.study.units import run_units
from fastfg.study.weights import sae_fingerprint

NOTES = """How a run goes on:
  Each batch is written to OUT/shards when it is done. The same command goes on
  after Ctrl-C, a kill or a crash, and computes only what is missing. Several
  processes may run the same command at once; they share the images.
  Another model, SAE, gate or other setting needs another folder. Only --shard
  and --max-failures may change, and evaluate can add --metrics and --methods.
  A file that was changed is computed again.
  --shard 2/4 computes the second of four parts of the images, for machines
  with folders of their own. To join them, copy OUT/shards of all machines into
  one folder, with the files' times, one fastfg.json and all maps, and run the
  command there without --shard.

"""
# Settings that change no result, or are in the recipe by their content
NOT_IN_RECIPE = (
    "out",
    "shard",
    "max_failures",
    "retry_failed",
    "weights",
    "pretrained",
    "saes",
    "device",
    "metrics",
    "methods",
    "groups",
)
WINDOW = {"low": "float64", "high": "float64"}
LIBRARIES = ("torch", "timm", "numpy", "pillow")


def add_result_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments for parts of the images and for images that fail."""
    add = command.add_argument_group("long runs").add_argument
    add("--shard", type=part, metavar="I/N", help="compute the I-th of N parts of the images; default: all")
    add("--max-failures", type=share_or_all, default=1.0, metavar="X", help="stop if a larger share of them fails")
    add("--retry-failed", action="store_true", help="try files again that could not be read in an earlier run")


class Results:
    """The results of one command on the images of ``inputs``, in its output folder.

    Raises ValueError if the folder has results of other settings, and names the setting. Nothing is written before
    :meth:`start`.
    """

    def __init__(self, arguments: argparse.Namespace, inputs: Inputs, columns: Mapping[str, str]) -> None:
        self.inputs, self.arguments = inputs, arguments
        self.number = {path_text(path): n for n, path in enumerate(inputs.paths)}
        self.paths = dict(zip(self.number, inputs.paths, strict=True))
        self.units = _units(inputs)
        contents = {
            "weights": fingerprint(inputs.model),
            "saes": {str(block): sae_fingerprint(sae) for block, sae in inputs.saes.items()},
        }
        kept = {name: value for name, value in inputs.settings.items() if name not in NOT_IN_RECIPE}
        if kept["split"] is None:  # folders of earlier versions go on
            del kept["split"]
        recipe = {"fastfg": __version__, **kept, "device": inputs.device.type, **contents}
        self.config = {"fastfg": __version__, "arguments": inputs.settings, **contents, "versions": _versions()}
        self.store = Store(inputs.out, arguments.command, columns={**columns, **WINDOW}, recipe=recipe, say=say)

    def start(self) -> None:
        """Make the output folder before anything in it is replaced.

        Raises ValueError if another command has made it since, for other settings.
        """
        if self.units:
            make_output(self.inputs.out, self.inputs.command, self.inputs.settings)
            self.store.start()

    def run(self, work: Work, title: str, do: Callable[[Batch, Work], list[dict[str, Any]]]) -> None:
        """Compute what is missing of ``work``.

        ``do`` gets a batch and returns its rows, with the path as ``key``. Raises ValueError if no image could be read.
        """
        if not self.units:
            raise self.inputs.nothing_read()
        _write_config(self.inputs.out / "config.json", self.inputs.command, self.config)
        changed = self.store.forget_others(self.units)
        if changed:
            say(f"Files have changed since an earlier run: {changed} of its batches are not used")
        if self.arguments.retry_failed:
            self.store.forget_failures()
        limit, own = self.arguments.max_failures, self._own()
        if not own:
            return  # rows says why

        def do_unit(unit: Unit, missing: Work) -> tuple[list[dict[str, Any]], list[Failure]]:
            batch = self.inputs.batch([self.paths[key] for key in unit.keys])
            rows = do(batch, missing) if batch.paths else []
            windows = dict(zip(map(path_text, batch.paths), batch.windows, strict=True))
            for row in rows:
                row["low"], row["high"] = windows[row["key"]] or (None, None)
            failed = [(path_text(error.path), _text(error.message)) for error in batch.errors]
            return rows, [Failure(path, path, message) for path, message in failed]

        try:
            with tracker() as track:
                progress = track(title)
                run_units(
                    self.store, own, work, do_unit, progress=lambda p: progress(p.done, p.total), max_failures=limit
                )
        finally:
            self.inputs.errors |= {row["path"]: row["error"] for row in self.store.failures().to_pylist()}
        if self.store.progress(own, work).failed == len(_keys(own)):
            raise self.inputs.nothing_read()

    def _own(self) -> list[Unit]:
        """The batches of this command's part of the images."""
        index, parts = self.arguments.shard or (1, 1)
        return self.units[index - 1 :: parts]

    def rows(self, work: Work) -> list[dict[str, Any]]:
        """The rows of images whose ``work`` is complete, in the order of the images, variants and measures."""
        complete = [unit.name for unit in self.units if not self.store.missing(unit, *work, refresh=False)]
        table = self.store.read(units=complete, variants=work.variants, measures=work.measures)
        place = {cell: n for n, cell in enumerate((v, m) for v in work.variants for m in work.measures)}
        rows = table.to_pylist()
        rows.sort(key=lambda row: (self.number[row["key"]], place[row["variant"], row["measure"]]))
        self.inputs.windows |= {
            row["key"]: (row["image"], row["low"], row["high"]) for row in rows if row["low"] is not None
        }
        self._say_complete(set(complete))
        return rows

    def _say_complete(self, complete: Collection[str]) -> None:
        """Say how much of this command's part of the images is done, unless it is all there is."""
        own = self._own()
        n, there = len(_keys(own)), len(_keys(unit for unit in own if unit.name in complete))
        index, parts = self.arguments.shard or (1, 1)
        part = f" of part {index} of {parts}" if parts > 1 else ""
        if self.units and not own:
            there_are = "there is 1 batch" if len(self.units) == 1 else f"there are {len(self.units)} batches"
            say(f"Part {index} of {parts} has no images: {there_are}")
        elif there < n:
            say(f"Complete: {there:,} of {n:,} images{part}. The same command goes on with the others")
        elif part:
            say(f"Complete: {there:,} of {n:,} images{part}. The other parts have {len(self.paths) - n:,}")


def _keys(units: Iterable[Unit]) -> list[str]:
    return [key for unit in units for key in unit.keys]


def _units(inputs: Inputs) -> list[Unit]:
    """The images in batches. A batch's name changes with its files, their sizes and times, those of their masks, and
    the classes that a manifest gives them.
    """
    units = []
    for first in range(0, len(inputs.paths), inputs.batch_size):
        paths = inputs.paths[first : first + inputs.batch_size]
        masks = [] if inputs.masks is None else [inputs.masks.get(path) for path in paths]
        states: list[Any] = [None if path is None else _state(path) for path in (*paths, *masks)]
        if isinstance(target := inputs.target(paths), list):  # the labels of a manifest
            states.append(target)
        digest = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:12]
        units.append(Unit(f"batch-{first // inputs.batch_size:06d}-{digest}", tuple(map(path_text, paths))))
    return units


def _state(path: Path) -> tuple[str, int, int]:
    try:
        state = path.stat()
    except OSError:  # reading it will say why
        return (path_text(path), -1, -1)
    return (path_text(path), state.st_size, state.st_mtime_ns)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write_config(file: Path, command: str, config: Mapping[str, Any]) -> None:
    """Write how the folder was made, by command: maps and scores may be in one folder."""
    before = read_json(file) if file.exists() else {}
    write_durably(file, (json.dumps({**before, command: config}, indent=2, default=str) + "\n").encode("ascii"))


def _text(message: str) -> str:
    """``message`` as text that can be written: names of files may have bytes that are not UTF-8."""
    return message.encode("utf-8", "backslashreplace").decode("utf-8")


def by_image(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """{(path, variant): its rows}."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["key"], row["variant"]), []).append(row)
    return found
