"""Perturb images patch by patch and read the model's output for them, in full batches.

A metric passes masks, and the engine returns readings. The engine runs the model through a :class:`ForwardPath`: on the
pixels, for any callable ``images -> logits``, or on the tokens of a known family.
"""

from fastfg.perturb.batches import Batches, to_device
from fastfg.perturb.engine import Engine
from fastfg.perturb.fills import FILLS, Baseline, make_fill, running_mean_fill
from fastfg.perturb.forward_path import ForwardPath, Paths
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.pixels import ImputedPixels, Pixels
from fastfg.perturb.precision import Precision
from fastfg.perturb.readings import Readings
from fastfg.perturb.seeds import generator, image_key, image_keys
from fastfg.perturb.tokens import Tokens
from fastfg.perturb.views import REMOVED, Fill, Imputed, View

__all__ = [
    "FILLS",
    "REMOVED",
    "Baseline",
    "Batches",
    "Engine",
    "Fill",
    "ForwardPath",
    "Imputed",
    "ImputedPixels",
    "PatchGrid",
    "Paths",
    "Pixels",
    "Precision",
    "Readings",
    "Tokens",
    "View",
    "generator",
    "image_key",
    "image_keys",
    "make_fill",
    "running_mean_fill",
    "to_device",
]
