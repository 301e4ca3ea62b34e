"""Find a function that explains another model than the one that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfg.models import Adapter


class OtherModel(TorchFunctionMode):
    """While active in this thread, notes whether a parameter of the evaluated model is used, and so not of its copy.

    A map that is the same when all parameters are re-drawn does not depend on the model, as that of an edge detector: a
    finding. If the evaluated model was run to make it, the function has ignored the model that it was given.

    Args:
        model: the evaluated model. n_maps: the maps per image.
    """

    def __init__(self, model: Adapter | nn.Module, n_maps: int) -> None:
        super().__init__()
        module = model.model if isinstance(model, Adapter) else model
        self._parameters = {id(parameter) for parameter in module.parameters()}
        self._used = False
        self._same = torch.ones(n_maps, dtype=torch.bool, device="cpu")
        self._judged = torch.zeros(n_maps, dtype=torch.bool, device="cpu")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._used = self._used or any(id(each) in self._parameters for each in (*args, *kwargs.values()))
        return func(*args, **kwargs)

    def add(self, made: Tensor, before: Tensor, given: Tensor, judged: Tensor) -> None:
        """Compare maps [n_maps, P] of one image, ``made`` with all parameters re-drawn, with those of the model.

        ``before`` are made again for the model, ``given`` are those of the evaluation. ``judged`` [n_maps] says which
        are compared.
        """
        same = (made == before).all(1) | (made == given).all(1)
        self._same &= same | ~judged
        self._judged |= judged

    def check(self, single: bool) -> None:
        """Raise ValueError where one of the maps is the same for every image, and was made with the model."""
        found = (self._same & self._judged).nonzero().flatten().tolist()
        if self._used and found:
            which = "" if single else f" (map {found[0]})"
            raise ValueError(
                f"explain: expected maps of the model that it is given, got the same maps{which} where all parameters "
                "are re-drawn (does it explain another model than its first argument?)"
            )
