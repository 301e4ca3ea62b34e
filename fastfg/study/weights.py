"""Tell SAEs apart by all that their codes depend on, and refuse those of a model with other weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

from fastfg.checks import check_layers
from fastfg.models import Adapter
from fastfg.models.fingerprint import fingerprint, fingerprints
from fastfg.sae.model import SparseAutoencoder


def sae_fingerprint(sae: SparseAutoencoder) -> str:
    """A hash of an SAE's weights and settings, such as ``k`` and the normalisation, and not of where it comes from."""
    settings = {name: value for name, value in sae.config().items() if name != "provenance"}
    return sha256((fingerprint(sae) + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def check_weights(adapter: Adapter, saes: Mapping[int, SparseAutoencoder]) -> None:
    """Raise ValueError for SAEs whose provenance names other weights than the model's."""
    check_layers("saes", list(saes), len(adapter.blocks))
    said = {block: sae.provenance["weights"] for block, sae in saes.items() if "weights" in sae.provenance}
    if not said:
        return
    own = fingerprints(adapter, said.keys())
    other = [block for block, weights in said.items() if own[block] != weights]
    if other:
        raise ValueError(f"saes: expected SAEs of this model's weights, got SAEs of other weights for blocks {other}")
