"""fastfg explains Vision Transformers by Feature-Gradient Attribution, and measures how faithful the maps are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Attribution": "fastfg.types",
    "FeatureGradient": "fastfg.attribution.feature_gradient",
    "Gate": "fastfg.types",
    "Scores": "fastfg.types",
    "SparseAutoencoder": "fastfg.sae.model",
    "Target": "fastfg.targets",
    "attribute": "fastfg.attribution.attribute",
    "compare": "fastfg.study.comparison",
    "evaluate": "fastfg.metrics.evaluate",
    "load_saes": "fastfg.sae.checkpoints",
    "residuals": "fastfg.attribution.residuals",
    "sae_report": "fastfg.attribution.sae_report",
    "train_sae": "fastfg.sae.train",
}
_MODULES = ("data", "metrics", "models", "ops", "perturb", "ray", "reference", "report", "sae", "study")

__all__ = [
    "Attribution",
    "FeatureGradient",
    "Gate",
    "Scores",
    "SparseAutoencoder",
    "Target",
    "__version__",
    "attribute",
    "compare",
    "evaluate",
    "load_saes",
    "residuals",
    "sae_report",
    "train_sae",
]

if TYPE_CHECKING:
    from fastfg.attribution.attribute import attribute
    from fastfg.attribution.feature_gradient import FeatureGradient
    from fastfg.attribution.residuals import residuals
    from fastfg.attribution.sae_report import sae_report
    from fastfg.metrics.evaluate import evaluate
    from fastfg.sae.checkpoints import load_saes
    from fastfg.sae.model import SparseAutoencoder
    from fastfg.sae.train import train_sae
    from fastfg.study.comparison import compare
    from fastfg.targets import Target
    from fastfg.types import Attribution, Gate, Scores


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import fastfg`` stays fast."""
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"fastfg.{name}")
    raise AttributeError(f"module 'fastfg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
