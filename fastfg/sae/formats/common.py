"""What the formats share: the contents of an SAE's files, what the user gave, and how the SAE is put together.

A format is a module with ``NAME``, ``FILES`` (for messages) and three functions: ``matches(contents)``,
``block(contents)`` (the block, or None where the files do not say it) and ``read(contents, given)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.files.allowed import Record
from fastfg.sae.files.containers import Weights, load
from fastfg.sae.files.stored import Odd, Stored, short
from fastfg.sae.model import DTYPES, SparseAutoencoder, check_finite

SITE = "resid_post"  # the one that fastfg reads: the block's output
POINT = re.compile(r"(?:vision_model\.|visual\.)?blocks\.(\d+)\.hook_resid_post")
TOKENS = ("patches", "all")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")  # as fastfg and several formats name them
OVERRIDES = (
    "site", "model", "tokens", "activation", "k", "threshold", "post", "normalize", "subtract_b_dec", "input_mean",
    "input_scale", "decoder_norm", "row_norm", "delta",
)  # fmt: skip
_KINDS = {int: "an integer", str: "a string", bool: "true or false", dict: "an object"}


class Config:
    """A JSON object, or the fields of a pickled one, and the file that it is in."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values, self.file = dict(values), file

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def has(self, *names: str) -> bool:
        """Whether it has any of these fields."""
        return any(name in self.values for name in names)

    def field(self, name: str, kind: type) -> Any:
        """The field ``name``. It must exist and be of type ``kind``; a bool is not an int."""
        if name not in self.values:
            raise ValueError(f"path: expected the field {name} in {self.file}, got {_names(self.values)}")
        value = self.values[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"path: expected {name} in {self.file} to be {_KINDS[kind]}, got {short(value)}")
        return value

    def optional(self, name: str, kind: type) -> Any:
        """The field ``name``, or None where it is missing or null."""
        return None if self.values.get(name) is None else self.field(name, kind)

    def inner(self, name: str) -> Config:
        """The object in the field ``name``, empty where it is missing."""
        value = self.values.get(name)
        return Config(value if isinstance(value, dict) else {}, self.file)


@dataclass
class Contents:
    """A weights file, and the configs beside it: {file name: its fields}."""

    weights: Weights
    configs: dict[str, Config] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.weights.file

    @property
    def kind(self) -> str:
        return self.weights.kind

    @property
    def keys(self) -> set[str]:
        """The names of what is at the file's top level."""
        content = self.weights.content
        return {key for key in content if isinstance(key, str)} if isinstance(content, dict) else set()

    def config(self, *fields: str) -> Config | None:
        """The config that has any of ``fields``; without fields, any config."""
        for config in self.configs.values():
            if not fields or config.has(*fields):
                return config
        return None

    def inside(self, *names: str) -> Config | None:
        """The config in the weights file itself, a dict or a pickled object, at the first of ``names`` that has one."""
        content = self.weights.content
        for name in names if isinstance(content, dict) else ():
            inner = content.get(name)
            if isinstance(inner, (Record, dict)):
                return Config(inner.fields if isinstance(inner, Record) else inner, self.file)
        return None

    def mapping(self, name: str | None = None) -> dict[str, Any]:
        """The tensors by name: the file's content, or what it has at ``name``."""
        content = self.weights.content
        if not isinstance(content, dict):
            got = f"an object of {content.name}" if isinstance(content, Record) else type(content).__name__
            raise ValueError(f"path: expected tensors by name in {self.file}, got {got}")
        if name is None:
            return content
        inner = content.get(name)
        if not isinstance(inner, dict):
            raise ValueError(f"path: expected {name} in {self.file} to be a dict, got {type(inner).__name__}")
        return inner

    def pick(
        self, state: Mapping[str, Any], names: Iterable[str], optional: Iterable[str] = (), unused: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The tensors ``names`` and those of ``optional`` that are there. Others than ``unused`` are an error."""
        names, optional = tuple(names), tuple(optional)
        known = {*names, *optional, *unused}
        unknown = sorted(str(key)[:60] for key in state if key not in known)
        if unknown:
            raise ValueError(f"path: expected tensors among {sorted(known)} in {self.file}, got {unknown[:12]}")
        wanted = [*names, *(name for name in optional if name in state)]
        return {name: self.tensor(state, name) for name in wanted}

    def tensor(self, state: Mapping[str, Any], name: str) -> Tensor:
        """The tensor ``name``. It must exist, be dense and be finite."""
        if name not in state:
            raise ValueError(f"path: expected {name} in {self.file}, got {_names(state)}")
        stored = state[name]
        if isinstance(stored, Odd):
            raise ValueError(f"path: expected {name} in {self.file} to be a dense tensor, got {stored.kind}")
        if not isinstance(stored, Stored):
            raise ValueError(f"path: expected {name} in {self.file} to be a tensor, got {type(stored).__name__}")
        if stored.dtype.is_floating_point and stored.dtype not in DTYPES:
            raise ValueError(f"path: expected {name} in {self.file} to be one of {DTYPES}, got {stored.dtype}")
        tensor = load(stored, self.file)
        try:
            check_finite({name: tensor})
        except ValueError:
            raise ValueError(f"path: expected finite weights in {self.file}, got NaN or infinity in {name}") from None
        return tensor

    def integer(self, state: Mapping[str, Any], name: str) -> int | None:
        """An integer, plain or as a tensor []; None where it is missing."""
        value = state.get(name)
        if isinstance(value, Stored) and not value.dtype.is_floating_point and value.shape == ():
            value = int(load(value, self.file))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"path: expected {name} in {self.file} to be an integer, got {short(value)}")
        return value


def _names(state: Mapping[Any, Any]) -> list[str]:
    return sorted(str(key)[:60] for key in state)[:12]


class Given:
    """What the user gave about an SAE whose files do not say it.

    ``need`` returns what the files leave out, ``agree`` what they may also say. What was given and is not asked for is
    an error: nothing that a user says is left out in silence.
    """

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        unknown = sorted(set(values) - set(OVERRIDES))
        if unknown:
            raise TypeError(f"load_saes: expected overrides among {OVERRIDES}, got {unknown}")
        self.values = {name: value for name, value in values.items() if value is not None}
        self.file, self.asked = file, set[str]()

    def may(self, name: str) -> Any:
        """What was given as ``name``, or None."""
        self.asked.add(name)
        return self.values.get(name)

    def need(self, name: str, why: str = "its files do not say it") -> Any:
        value = self.may(name)
        if value is None:
            raise ValueError(f"{name}: expected it to be given for {self.file}, because {why}")
        return value

    def agree(self, name: str, said: Any, why: str = "its files do not say it") -> Any:
        """What the file says, or what was given if it says nothing (None). Both must be the same."""
        if said is None:
            return self.need(name, why)
        value = self.may(name)
        if value is not None and value != said:
            raise ValueError(f"{name}: expected {said!r}, as {self.file} says, got {value!r}")
        return said

    def site(self, said: str | None) -> str:
        """The site, which must be a block's output. ``said``: what the file says; None if it does not say it."""
        if said not in (None, SITE):
            raise ValueError(f"site: expected an SAE of a block's output ({SITE}), got {said!r} in {self.file}")
        return str(self.agree("site", said, f"its files do not say where it plugs in ({SITE!r}: a block's output)"))

    def finish(self) -> list[str]:
        """The names of what was used. Raises ValueError for what was not."""
        unused = sorted(set(self.values) - self.asked)
        if unused:
            raise ValueError(f"{unused[0]}: expected it not to be given for {self.file}, which needs no such value")
        return sorted(self.values)


def text(value: Any) -> str | None:
    """A string as it is, and None for anything else."""
    return value if isinstance(value, str) else None


def said_tokens(class_only: Any, patches_only: Any, file: Path) -> str | None:
    """The tokens that an SAE was trained on, by two flags of its config; None if they are missing."""
    if class_only is None and patches_only is None:
        return None
    if class_only is True:
        raise ValueError(f"path: expected an SAE of patch tokens in {file}, got one of the class token alone")
    return "patches" if patches_only is True else "all"


def build(
    contents: Contents,
    given: Given,
    name: str,
    *,
    site: str | None,
    layer: int | None = None,
    model: str | None = None,
    tokens: str | None = None,
    folded: Iterable[str] = (),
    **arguments: Any,
) -> SparseAutoencoder:
    """The SAE, with its provenance. ``site``, ``model``, ``tokens``: what the files say; None: nothing."""
    site = given.site(site)
    asked = given.may("model")
    if asked is not None and model is not None and asked != model:
        raise ValueError(f"model: expected an SAE of {asked!r}, got one of {model!r} in {contents.file}")
    other = given.may("tokens")
    if other is not None and (other not in TOKENS or tokens not in (None, other)):
        raise ValueError(f"tokens: expected {tokens or TOKENS!r} for {contents.file}, got {other!r}")
    from_user = given.finish()
    provenance = {
        "format": name,
        "file": contents.file.name,
        "layer": layer,
        "site": site,
        "model": model or asked,
        "tokens": tokens or other,
        "folded": list(folded),
        "given": from_user,
    }
    arguments["provenance"] = {key: value for key, value in provenance.items() if value not in (None, [])}
    return SparseAutoencoder(**arguments)


# Parts of several formats --------------------------------------------------------------------------------------------


def standard(picked: Mapping[str, Tensor]) -> dict[str, Any]:
    """``W_enc [d, F]``, ``b_enc``, ``W_dec [F, d]``, ``b_dec`` as they are."""
    return {name: picked[name] for name in TENSORS}


def transposed(picked: Mapping[str, Tensor], name: str, contents: Contents) -> Tensor:
    """The matrix ``name``, transposed as the model needs it."""
    matrix = picked[name]
    if matrix.ndim != 2:
        raise ValueError(f"path: expected {name} in {contents.file} to be a matrix, got {list(matrix.shape)}")
    return matrix.T.contiguous()


def like(value: Tensor | float, weights: Tensor) -> Tensor:
    """A threshold, mean or scale in the dtype of the weights, as torch compares and divides them."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"expected a number or a tensor, got {type(value).__name__}")
    return value.to(weights) if isinstance(value, Tensor) else torch.tensor(value, dtype=weights.dtype)


def scalar(value: Tensor, weights: Tensor) -> Tensor:
    """A tensor [] or [1] as a tensor [] in the dtype of the weights."""
    return like(value.reshape(()) if value.numel() == 1 else value, weights)


def input_affine(given: Given, weights: Tensor, why: str) -> dict[str, Tensor | None]:
    """``input_mean`` and ``input_scale``, which must be given. A mean of 0 and a scale of 1 are none."""
    mean, scale = given.need("input_mean", why), given.need("input_scale", why)
    no_mean = not isinstance(mean, Tensor) and mean == 0
    no_scale = not isinstance(scale, Tensor) and scale == 1
    return {
        "input_mean": None if no_mean else like(mean, weights).expand(weights.shape[0]).clone(),
        "input_scale": None if no_scale else like(scale, weights),
    }


def check_width(config: Config, sae: SparseAutoencoder, file: Path, d: str = "d_in", F: str = "d_sae") -> None:
    """Require the widths that the config says, where it says them."""
    for name, size in ((d, sae.d), (F, sae.n_features)):
        if config.get(name) is not None and config.field(name, int) != size:
            raise ValueError(
                f"path: expected {name}={config.get(name)} in {file}, as {config.file.name} says, got {size}"
            )


def block_at(config: Config, name: str) -> int | None:
    """A 0-based block in the field ``name``. One that counts from the end is None: its number is not known."""
    value = config.optional(name, int)
    return None if value is None or value < 0 else value
