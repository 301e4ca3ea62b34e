"""Refuse SAEs that were trained on a model with other weights."""

from __future__ import annotations

from collections.abc import Mapping

from fastfg.models import Adapter
from fastfg.models.fingerprint import fingerprints
from fastfg.sae.model import SparseAutoencoder


def check_weights(adapter: Adapter, saes: Mapping[int, SparseAutoencoder]) -> None:
    """Raise ValueError for SAEs whose provenance names other weights than the model's."""
    said = {block: sae.provenance["weights"] for block, sae in saes.items() if "weights" in sae.provenance}
    if not said:
        return
    own = fingerprints(adapter, said.keys())
    other = [block for block, weights in said.items() if own[block] != weights]
    if other:
        raise ValueError(f"saes: expected SAEs of this model's weights, got SAEs of other weights for blocks {other}")
