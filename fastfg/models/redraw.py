"""Copies of a model whose parameters are re-drawn part by part. The model itself is left as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfg.models import find_adapter
from fastfg.models.adapter import Adapter
from fastfg.models.hold import hold
from fastfg.torch_internals import uncompiled

# What a copied adapter takes over from the given one; the rest refers to the modules of the copy.
KEPT = (
    "num_prefix_tokens",
    "grid",
    "in_chans",
    "pooled",
    "later_attentions",
    "pixel_mean",
    "pixel_std",
    "patch_size",
    "has_logits",
)


class Part(NamedTuple):
    """The parameters that are re-drawn in one step: ``parameters`` is {name of a module: names of its own ones}."""

    name: str
    parameters: dict[str, list[str]]


def copy_model(model: Any) -> Any:
    """A copy of ``model``, an ``nn.Module`` or an :class:`Adapter`.

    Raises ValueError for what ``copy.deepcopy`` can't copy, and TypeError for other callables.
    """
    if not isinstance(model, (Adapter, nn.Module)):
        raise TypeError(
            f"model: expected an nn.Module or a fastfg.models.Adapter, as a copy of it is re-drawn, got "
            f"{type(model).__name__}"
        )
    family = isinstance(model, Adapter) and find_adapter(model.model) is not None
    try:
        other = copy.deepcopy(model.model if family else uncompiled(model))
    except Exception as error:  # whatever the model's parts raise
        raise ValueError(
            f"model: expected one that copy.deepcopy can copy, as a copy of it is re-drawn, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not family:
        return other
    adapter = find_adapter(other)
    assert adapter is not None  # a copy has the class of the model
    return dataclasses.replace(adapter, **{name: getattr(model, name) for name in KEPT})


def find_parts(model: nn.Module | Adapter, images: Tensor, read: Callable[[Any], Tensor]) -> list[Part]:
    """The parts of ``model`` from the output down to the input.

    For a known family or an adapter: ``head`` (all that lies between the last block and the target), each block, and
    ``embedding`` (the rest). For another model: each module that has parameters of its own, in reverse order of
    ``named_modules``.

    Args:
        images: [B, C, H, W], read once. read: the model's output -> the target's value per image [B].
    """
    root, adapter = _module(model), find_adapter(model)
    own = {
        name: [p for p, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
        for name, module in root.named_modules()
    }
    own = {name: parameters for name, parameters in own.items() if parameters}
    if adapter is None:
        return [Part(name or type(root).__name__, {name: own[name]}) for name in reversed(own)]
    place = {id(p): "head" for p in _after_blocks(adapter, images, read)}
    for number, block in enumerate(adapter.blocks):
        place |= {id(p): f"block {number}" for p in block.parameters()}
    order = ["head", *(f"block {n}" for n in reversed(range(len(adapter.blocks)))), "embedding"]
    parts: dict[str, dict[str, list[str]]] = {name: {} for name in order}
    for module, parameters in own.items():
        for parameter in parameters:
            part = place.get(id(getattr(root.get_submodule(module), parameter)), "embedding")
            parts[part].setdefault(module, []).append(parameter)
    return [Part(name, parts[name]) for name in order if parts[name]]


def redraw(model: nn.Module | Adapter, part: Part, seed: int) -> None:
    """Re-draw the parameters of ``part``, in place. The values depend on ``seed`` alone, not on the device.

    A module with ``reset_parameters`` is reset by it, as Adebayo et al. and Quantus do: layers of weights are random,
    and a norm is 1 and 0. The values of other parameters (class token, position embedding) are permuted. torch's
    global random state is left as it is.
    """
    root = _module(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for name, parameters in part.parameters.items():
            module = root.get_submodule(name)
            own = [p for p, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
            if callable(getattr(module, "reset_parameters", None)) and own == parameters:
                drawn: Any = copy.deepcopy(module).to("cpu")
                drawn.reset_parameters()
                module.load_state_dict(drawn.state_dict())
                continue
            for parameter in (getattr(module, p) for p in parameters):
                values = parameter.flatten()
                order = torch.randperm(len(values), device="cpu").to(values.device)
                parameter.copy_(values[order].reshape(parameter.shape))


@torch.no_grad()
def read_model(model: nn.Module | Adapter, images: Tensor, read: Callable[[Any], Tensor]) -> Tensor:
    """The target's value [B] of ``model`` on ``images``, float64 on the CPU."""
    adapter = find_adapter(model)
    forward: Any = model if adapter is None else adapter.forward
    with _still(model):
        return read(forward(images.clone())).detach().double().cpu()


def _after_blocks(adapter: Adapter, images: Tensor, read: Callable[[Any], Tensor]) -> list[Tensor]:
    """The parameters that the target depends on even if the last block's output is held constant."""

    def stop(module: nn.Module, given: Any, output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            return (output[0].detach(), *output[1:])
        return output.detach()

    with _still(adapter), torch.inference_mode(False), torch.enable_grad():
        parameters = [p for p in adapter.model.parameters() if p.is_floating_point()]
        for parameter in parameters:  # until hold() restores it
            parameter.requires_grad_(True)
        handle = adapter.blocks[-1].register_forward_hook(stop)
        try:
            value = read(adapter.forward(images.detach().clone())).sum()
        finally:
            handle.remove()
        if not value.requires_grad:  # nothing follows the blocks
            return []
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return [p for p, g in zip(parameters, gradients, strict=True) if g is not None]


def _still(model: nn.Module | Adapter) -> AbstractContextManager[None]:
    adapter = find_adapter(model)
    return hold(_module(model)) if adapter is None else hold(adapter.model, adapter.flags)


def _module(model: nn.Module | Adapter) -> nn.Module:
    """The module whose parameters are those of ``model``."""
    module: nn.Module = uncompiled(model.model if isinstance(model, Adapter) else model)
    return module
