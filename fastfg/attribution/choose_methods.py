"""The other explanations of one call: which ones were asked for, and their maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfg.attribution import priors
from fastfg.attribution.integrated_gradients import integrated_gradients
from fastfg.attribution.relevancy_pass import working_dtype
from fastfg.models import Adapter
from fastfg.perturb.masks import PatchGrid
from fastfg.perturb.seeds import image_keys
from fastfg.targets import Target
from fastfg.types import METHODS, Methods

OPTIONS = {"centre": ("width",), "integrated_gradients": ("steps", "baseline"), "grad_cam": ("layer",)}


class Chosen(NamedTuple):
    """The methods of one call.

    Attributes:
        by_name: {name: a name in ``METHODS``, a tensor [B, gh, gw] or a callable}.
        options: {name in ``METHODS``: its arguments}.
    """

    by_name: dict[str, Any]
    options: dict[str, Mapping[str, Any]]

    @property
    def built_in(self) -> set[str]:
        """The names in ``METHODS`` that are needed."""
        return {method for method in self.by_name.values() if isinstance(method, str)}


class Explained(NamedTuple):
    """What is explained, for methods that run after the pass.

    Attributes:
        images: [B, C, H, W]. target: resolved for these images. named: the target as results name it, classes [B] or
            what was given. seed, keys: what random draws depend on.
    """

    adapter: Adapter
    images: Tensor
    grid: PatchGrid
    target: Target
    named: Any
    seed: int
    keys: Sequence[Any] | None


def methods_by_name(methods: Methods) -> dict[str, Any]:
    """{name: method}. Raises TypeError or ValueError if they are not distinct names."""
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise TypeError(f"methods: expected a list of names among {METHODS}, or {{name: method}}, got {methods!r}")
    names = list(methods)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"methods: expected names, or {{name: method}}, got {wrong[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"methods: expected each name once, got {names}")
    return dict(methods) if isinstance(methods, Mapping) else dict(zip(names, names, strict=True))


def choose_methods(methods: Methods, options: Mapping[str, Any]) -> Chosen:
    """The methods by name, checked. ``options`` is {name in ``METHODS``: its arguments}."""
    by_name = methods_by_name(methods)
    for name, method in by_name.items():
        if isinstance(method, str) and method not in METHODS:
            unknown = [m for m in by_name.values() if isinstance(m, str) and m not in METHODS]
            raise ValueError(f"methods: expected names among {METHODS}, got {unknown}")
        if not isinstance(method, str) and not callable(method) and not hasattr(method, "__array__"):
            raise TypeError(
                f"methods[{name!r}]: expected a name, a tensor [B, gh, gw] or a callable (images, target) -> maps, "
                f"got {type(method).__name__}"
            )
    if unknown := [name for name in options if name not in METHODS]:
        raise TypeError(f"attribute: unexpected argument {unknown[0]!r}")
    chosen = Chosen(by_name, {name: given for name, given in options.items() if given is not None})
    _check_options(chosen)
    return chosen


def _check_options(chosen: Chosen) -> None:
    for name, given in chosen.options.items():
        if not isinstance(given, Mapping):
            raise TypeError(f"{name}: expected a mapping of options, got {type(given).__name__}")
        unknown = sorted(set(given) - set(OPTIONS.get(name, ())))
        if unknown:
            raise TypeError(f"{name}: expected options among {OPTIONS.get(name, ())}, got {unknown}")
        if given and name not in chosen.built_in:
            raise ValueError(f"{name}: expected no options, as it is not among the methods, got some")


def explain(chosen: Chosen, of_the_pass: Mapping[str, Tensor], explained: Explained) -> dict[str, Tensor]:
    """{name: [B, gh, gw]} in the order of ``chosen``, on the images' device."""
    keys = image_keys(explained.images, explained.keys) if _needs_keys(chosen) else []
    maps = {}
    for name, method in chosen.by_name.items():
        if isinstance(method, str) and method in of_the_pass:
            maps[name] = of_the_pass[method]
        elif isinstance(method, str):
            made = _built_in(method, name, chosen.options.get(method, {}), explained, keys)
            maps[name] = made.to(explained.images.device, working_dtype(explained.images))
        else:
            maps[name] = given_maps(name, method, explained)
    return maps


def _needs_keys(chosen: Chosen) -> bool:
    return bool({"random", "integrated_gradients"} & chosen.built_in)


def _built_in(method: str, name: str, options: Mapping[str, Any], explained: Explained, keys: list[str]) -> Tensor:
    """The maps of a method that is not part of the pass."""
    adapter, images, grid = explained.adapter, explained.images, explained.grid
    if method == "random":
        return priors.random_maps(keys, grid, explained.seed, name)
    if method == "centre":
        return priors.centre_map(grid, **options).repeat(len(images), 1, 1)
    if method == "edges":
        return priors.edge_maps(images, grid, adapter.pixel_std)
    assert method == "integrated_gradients"
    return integrated_gradients(adapter, images, explained.target, grid, keys, explained.seed, **options)


def given_maps(name: str, method: Any, explained: Explained) -> Tensor:
    """The maps of a method from elsewhere: a tensor, or a callable that is given the images and the target."""
    images, grid = explained.images, explained.grid
    if not callable(method):
        return _checked(name, method, images, grid)
    with torch.inference_mode(False), torch.enable_grad():
        named = explained.named.clone() if isinstance(explained.named, Tensor) else explained.named
        return _checked(name, method(images.detach().clone(), named), images, grid)


def _checked(name: str, maps: Any, images: Tensor, grid: PatchGrid) -> Tensor:
    """``maps``, a tensor or array, as a tensor [B, gh, gw]. NaN is kept: ``evaluate`` names it."""
    is_array = hasattr(maps, "__array__") and not isinstance(maps, Tensor)
    found = torch.as_tensor(maps, device="cpu") if is_array else maps
    expected = [len(images), grid.gh, grid.gw]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"methods[{name!r}]: expected floating maps {expected}, got {got}")
    if list(found.shape) != expected:
        hint = ""
        if found.ndim in (3, 4) and found.shape[-2:] == images.shape[-2:]:
            channels = ".sum(1)" if found.ndim == 4 else ""
            hint = (
                f", one value per pixel: torch.nn.functional.avg_pool2d(maps{channels}, ({grid.ph}, {grid.pw})) is "
                "one value per patch"
            )
        raise ValueError(f"methods[{name!r}]: expected maps {expected}, got {list(found.shape)}{hint}")
    return found.detach().to(images.device, working_dtype(images), copy=True)
