"""The SAEs of a study by their kind: from the folders that its file names, or from the study's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from fastfg.models import Adapter
from fastfg.sae.checkpoints import find_saes, load_saes
from fastfg.sae.model import SparseAutoencoder
from fastfg.study.config import Config
from fastfg.study.weights import check_weights

SAEsByKind: TypeAlias = Mapping[str, Mapping[int, SparseAutoencoder]]


def check_folders(config: Config) -> None:
    """Refuse folders in the file that have no SAE for one of the study's blocks. Nothing is loaded."""
    for kind, folder in config.saes.folders.items():
        if kind in config.kinds:
            with _named(config, kind):
                find_saes(folder, config.protocol.layers)


def load_by_kind(config: Config) -> dict[str, dict[int, SparseAutoencoder]]:
    """{kind: {block: SAE}}. Raises ValueError for SAEs that say of themselves that they are of another kind."""
    found, own = {}, config.run.out / "saes"
    for kind in config.kinds:
        with _named(config, kind):
            found[kind] = load_saes(config.saes.folders.get(kind, own / kind), config.protocol.layers)
        for block, sae in found[kind].items():
            said = (sae.provenance.get("recipe") or {}).get("kind", kind)
            if said != kind:
                raise ValueError(
                    f"saes.folders.{kind}: expected SAEs of this kind, got one of the kind {said!r} for {block}"
                )
    return found


def check_model(config: Config, saes: SAEsByKind, model: Adapter) -> None:
    """Raise ValueError for SAEs of other weights than the model's."""
    for kind, of_kind in saes.items():
        with _named(config, kind):
            check_weights(model, of_kind)


@contextmanager
def _named(config: Config, kind: str) -> Iterator[None]:
    """Context in which an error about SAEs of this kind begins with the setting that names their folder."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if kind not in config.saes.folders:
            raise
        text = str(error)
        for argument in ("source: ", "path: ", "saes: "):
            text = text.removeprefix(argument)
        raise ValueError(f"saes.folders.{kind}: {text}") from None
