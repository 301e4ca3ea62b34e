"""The perturbation engine: masks over patches in, readings of the model's output back.

It sees a callable ``images -> logits``, or another :class:`ForwardPath`, and nothing of any model library.
"""

from fastfg.perturb.fills import FILLS, make_fill, running_mean_fill
from fastfg.perturb.engine import Engine
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.forward_path import ForwardPath
from fastfg.perturb.pixels import Pixels
from fastfg.perturb.precision import Precision
from fastfg.perturb.readings import Readings
from fastfg.perturb.seeds import generator, image_key

__all__ = [
    "FILLS",
    "Engine",
    "PatchGrid",
    "ForwardPath",
    "Pixels",
    "Precision",
    "Readings",
    "generator",
    "image_key",
    "make_fill",
    "running_mean_fill",
]
