"""The perturbation engine: masks over patches in, readings of the model's output back.

It sees a callable ``images -> logits`` and nothing of any model library.
"""

from fastfg.perturb.baselines import BASELINES, make_fill, running_mean_fill
from fastfg.perturb.engine import Engine, Readings
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.seeds import generator, image_key

__all__ = ["BASELINES", "Engine", "PatchGrid", "Readings", "generator", "image_key", "make_fill", "running_mean_fill"]
