"""The variants of a study: explanations that differ in their gate, their SAEs or their method, and their maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfg.attribution.attribute import attribute
from fastfg.models import Adapter
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import Attribution, Gate

TRAINED = "trained"


@dataclass(frozen=True)
class Variant:
    """One way to explain images.

    Attributes:
        name: for tables. gate: its gate, or None. saes: the kind of SAEs of the gate. method: an explanation that needs
            no gate, one of ``fastfg.types.METHODS``. Without gate and method it is vanilla TransMM.
    """

    name: str
    gate: Gate | None = None
    saes: str = TRAINED
    method: str | None = None

    def identity(self, weights: Mapping[str, Mapping[int, str]]) -> str:
        """A text that two variants share exactly if they have the same maps.

        Args:
            weights: {kind: {block: a hash of the SAE's weights}}.
        """
        if self.method is not None:
            return self.method
        gate = self.gate
        if gate is None:
            return "vanilla"
        blocks = ",".join(map(str, gate.layers))
        parts = [f"{gate.score} blocks={blocks} kappa={float(gate.kappa)!r} c_max={float(gate.c_max)!r}"]
        parts += [f"{name}={getattr(gate, name)}" for name in ("shuffle_seed", "permute_seed") if _set(gate, name)]
        parts += [name for name in ("rescale", "blurred") if getattr(gate, name)]
        if gate.needs_sae:
            parts.append("saes=" + ",".join(weights[self.saes][block][:8] for block in gate.layers))
        return " ".join(parts)


def _set(gate: Gate, name: str) -> bool:
    return getattr(gate, name) is not None


def explain(
    model: Adapter,
    images: Tensor,
    variants: Sequence[Variant],
    saes: Mapping[str, Mapping[int, SparseAutoencoder]],
    *,
    target: Any = None,
    keys: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Attribution]:
    """The maps of all variants [C, B, gh, gw], and their attribution, from one forward and one backward pass.

    ``target``, ``keys`` and ``seed`` are as in :func:`fastfg.attribute`.
    """
    gated = [variant for variant in variants if variant.method is None]
    found = attribute(
        model,
        images,
        saes=[saes.get(variant.saes, {}) for variant in gated] or [None],
        gate=[variant.gate for variant in gated] or [None],
        target=target,
        methods={variant.name: variant.method for variant in variants if variant.method is not None},
        seed=seed,
        keys=keys,
    )
    maps = {variant.name: one for variant, one in zip(gated, found.maps, strict=False)} | found.methods
    return torch.stack([maps[variant.name] for variant in variants]), found
