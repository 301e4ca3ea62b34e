"""Explain and judge the images of a Ray Data data set: the callable of ``Dataset.map_batches``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastfg.attribution.attribute import attribute
from fastfg.attribution.relevancy_pass import maps_dtype
from fastfg.data import read_image
from fastfg.metrics.choose import METRICS
from fastfg.metrics.evaluate import evaluate
from fastfg.models import adapt
from fastfg.models.load import load
from fastfg.models.timm import preprocessing
from fastfg.sae.checkpoints import load_saes
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import probabilities
from fastfg.types import Gate

Columns = dict[str, Any]  # {name: one entry per image}
NO_TARGET = -1


class Explain:
    """Maps of batches of images, and scores if ``metrics`` are given. Each Ray actor makes its model once.

    A batch is {"image": ..., "id": ...}. An image is the bytes of a file, read by :func:`fastfg.data.read_image`; or
    uint8 [H, W, 3] or [H, W], 0 to 255; or floating-point [C, H, W], which the model gets as it is. All images of a
    batch must have the same size after ``transform``.

    Args:
        model: a function that makes the model, in eval mode; or the name of a timm model, with ``weights``.
        weights: a file with the model's state dict, see :func:`fastfg.models.load`.
        transform: a PIL image -> [C, H, W]; None: the model's own (timm's models).
        saes: a folder for :func:`fastfg.load_saes`, or a function that makes {block: SAE}.
        gate: a :class:`fastfg.Gate`; None: vanilla.
        target: the class to explain; None: the predicted one.
        metrics: names of :data:`fastfg.metrics.METRICS`. options: more arguments of :func:`fastfg.evaluate`.
        device: of the model; None: ``cuda`` if there is one, else ``cpu``.

    Each call returns one entry per image, in the order of the batch: ``id``; ``map`` float32 [B, gh, gw], not
    normalised; ``target`` int64 and its ``probability``; one float64 column per metric; and ``error``, a text. An image
    that cannot be read has an error, the target -1, and NaN elsewhere. A score that cannot be computed is NaN, and the
    error says why. Raises ValueError for a batch without ``image`` or ``id``, and the errors of
    :func:`fastfg.attribute` and :func:`fastfg.evaluate`.

    With Ray: ``dataset.map_batches(fastfg.ray.Explain, fn_constructor_kwargs={"model": make}, batch_size=16,
    compute=ray.data.ActorPoolStrategy(size=4))``. Ray itself is not needed to use the class:

    >>> import numpy as np, fastfg.ray
    >>> def make():
    ...     return fastfg.models.load("vit_tiny_patch16_224", pretrained=False, num_classes=5)[0]
    >>> explain = fastfg.ray.Explain(make)
    >>> found = explain({"id": [7, 8], "image": np.zeros((2, 30, 40, 3), np.uint8)})
    >>> found["id"], found["map"].shape, sorted(found)
    ([7, 8], (2, 14, 14), ['error', 'id', 'map', 'probability', 'target'])
    """

    def __init__(
        self,
        model: Callable[[], nn.Module] | str,
        *,
        weights: str | Path | None = None,
        transform: Callable[[Any], Tensor] | None = None,
        saes: str | Path | Callable[[], Mapping[int, SparseAutoencoder]] | None = None,
        gate: Gate | None = None,
        target: int | None = None,
        metrics: Sequence[str] = (),
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, str) == (weights is None):
            raise ValueError("weights: expected a file for the name of a model, and none for a function that makes one")
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"metrics: expected names among {tuple(METRICS)}, got {unknown[0]!r}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        made = load(model, weights)[0] if isinstance(model, str) else model()
        self.model = made.to(self.device).eval()
        adapter = adapt(self.model)
        self.dtype = next(adapter.blocks[0].parameters()).dtype
        self.maps_dtype = np.float64 if maps_dtype(adapter, self.dtype) == torch.float64 else np.float32
        found = {} if saes is None else saes() if callable(saes) else load_saes(saes, gate.layers if gate else None)
        self.saes = {block: sae.to(self.device) for block, sae in found.items()}
        self.transform, self.gate, self.target = transform, gate, target
        self.metrics, self.options = list(metrics), options
        self.grid = (1, 1)  # of maps of images that cannot be read, until one was read

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """The columns for one batch."""
        if missing := [name for name in ("image", "id") if name not in batch]:
            raise ValueError(f"batch: expected the columns 'image' and 'id', got no {missing[0]!r} in {list(batch)}")
        errors, tensors, places = [""] * len(batch["id"]), [], []
        for place, image in enumerate(batch["image"]):
            try:
                tensors.append(self._tensor(image))
                places.append(place)
            except Exception as error:  # for damaged files, decoders can raise anything; the error is in the row
                errors[place] = f"{type(error).__name__}: {error}"
        found = self._explain(torch.stack(tensors), places, errors) if tensors else {}
        n = len(errors)
        maps = np.full((n, *self.grid), np.nan, self.maps_dtype)
        columns: Columns = {"id": batch["id"], "map": maps, "target": np.full(n, NO_TARGET, np.int64)}
        columns |= {name: np.full(n, np.nan) for name in ("probability", *self.metrics)}
        for name, values in found.items():
            columns[name][places] = values
        return columns | {"error": np.array(errors, dtype=object)}

    def _explain(self, images: Tensor, places: Sequence[int], errors: list[str]) -> Columns:
        """The columns of the images that were read. Why a score is missing is added to ``errors``."""
        images = images.to(self.device, self.dtype)
        result = attribute(self.model, images, saes=self.saes, gate=self.gate, target=self.target)
        self.grid = (result.maps.shape[1], result.maps.shape[2])
        probability = probabilities(result.logits).gather(1, result.target[:, None])[:, 0]
        columns = {"map": result.maps, "target": result.target, "probability": probability.double()}
        if self.metrics:
            scores = evaluate(
                self.model, images, result.maps, target=result.target, metrics=self.metrics, **self.options
            )
            columns |= {name: scores[name] for name in self.metrics}
            for error in scores.errors:
                text = f"{error.metric}: {error.message}"
                place = places[error.image]
                errors[place] = f"{errors[place]}; {text}" if errors[place] else text
        return {name: values.detach().cpu().numpy() for name, values in columns.items()}

    def _tensor(self, image: Any) -> Tensor:
        """The model's input [C, H, W] for one image."""
        from PIL import Image

        if isinstance(image, bytes):
            picture = _read(image)
        else:
            array = np.asarray(image)
            if array.dtype.kind == "f" and array.ndim == 3:
                return torch.from_numpy(array.copy())
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
                expected = "bytes, uint8 [H, W, 3] or [H, W], or floating-point [C, H, W]"
                raise ValueError(f"image: expected {expected}, got {array.dtype} {list(array.shape)}")
            picture = Image.fromarray(array)
        if self.transform is None:
            self.transform = preprocessing(self.model)
        return self.transform(picture)


def _read(content: bytes) -> Any:
    """The PIL image in the bytes of a file."""
    with tempfile.NamedTemporaryFile() as file:  # read_image has its rules for files
        file.write(content)
        file.flush()
        try:
            return read_image(file.name).image
        except Exception as error:  # that file's name says nothing
            error.args = tuple(a.replace(file.name, "bytes") if isinstance(a, str) else a for a in error.args)
            raise
