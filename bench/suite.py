"""A suite: its cases, its providers, the reference that checks them, and the work that sets the floor."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfg import ops, reference
from fastfg.ops.dispatch import BACKENDS, why_not

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16-decoder": torch.float32}
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One shape in one dtype. ``bfloat16-decoder`` is float32 with a bfloat16 decoder."""

    shape: Mapping[str, int | str]
    dtype: str = "float32"

    def __str__(self) -> str:
        """The name in pytest. It has no "=", because ``pytest -k`` does not accept it."""
        return "-".join([*(f"{key}{value}" for key, value in self.shape.items()), self.dtype])

    def __getattr__(self, key: str) -> Any:
        try:
            return self.shape[key]
        except KeyError:
            raise AttributeError(key) from None

    @property
    def element(self) -> int:
        """Bytes per number of the decoder, or of the tensor that is read most."""
        return 4 if self.dtype == "float32" else 2

    def generator(self, device: str) -> Callable[..., Tensor]:
        """A function that draws seeded normal numbers in the case's dtype; every provider gets the same ones."""
        random = torch.Generator(device).manual_seed(0)
        return lambda *size: torch.randn(*size, generator=random, device=device, dtype=DTYPES[self.dtype])


@dataclass(frozen=True)
class Provider:
    """One implementation of the work.

    Args:
        make: takes the case's arguments, prepares what is not timed, and returns the function to time.
        bar: for an implementation that is not fastfg's. ``whole`` does all of the work. ``part`` does a part of it, or
            other work to compare with, so its result is not checked.
        backend: the backend that does the work, to write into the results.
        why_not: takes the case and the device, and returns the reason why it cannot run, or None.
    """

    make: Callable[..., Callable[[], Any]]
    bar: str = ""
    backend: str = "torch"
    why_not: Callable[[Case, str], str | None] = lambda case, device: None


@dataclass(frozen=True)
class Work:
    """The least work: ``bytes`` moved, and ``flops`` of matrix products (2 per multiply-add)."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Suite:
    """One file's benchmarks.

    Args:
        small, full: the cases of each size.
        arguments: takes a case and a device, and returns the arguments of every provider.
        part: cuts the arguments down to the few tokens or images that are compared with ``exact`` in float64.
        pick: takes a result and its arguments, and returns the tensors to compare, for ``part`` only.
        exact: the reference; it gets the arguments of ``part``.
        work: takes a case, and returns its least work; None if no floor is defined.
        tolerance: the largest error in float32 (the norm of the difference over the norm of the exact result).
        beside: takes the arguments, and returns a name and a function to run alternately with each of fastfg's
            providers. A machine that becomes slower does not change their ratio.
        timed: False for a suite that measures peak memory only, on a CPU too.
    """

    name: str
    small: Sequence[Case]
    full: Sequence[Case]
    providers: Mapping[str, Provider]
    arguments: Callable[[Case, str], Arguments]
    part: Callable[[Arguments], Arguments]
    pick: Callable[[Any, Arguments], tuple[Tensor, ...]]
    exact: Callable[..., Any]
    work: Callable[[Case], Work] | None = None
    tolerance: float = 1e-4
    beside: Callable[[Case, Arguments], tuple[str, Callable[[], Any]]] | None = None
    timed: bool = True


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def first(n: int) -> Callable[[Any, Arguments], tuple[Tensor, ...]]:
    """The ``pick`` of ops with one output row per token: the first ``n`` tokens."""
    return lambda result, arguments: tuple(t[:n] for t in outputs(result))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy with every floating-point tensor in ``dtype``, also inside modules, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return tuple(cast(item, dtype) for item in value) if type(value) is tuple else value


def direct(function: Callable[..., Any], **options: Any) -> Callable[..., Callable[[], Any]]:
    """The ``make`` of a function that needs no preparation."""
    return lambda *arguments: functools.partial(function, *arguments, **options)


def op_providers(op: str, whole: Callable[..., Any] | None = None) -> dict[str, Provider]:
    """The reference, the reference under torch.compile, and fastfg's backends.

    ``whole``: the same equations without tiles, for torch.compile, which would unroll the tiles of the reference.
    """

    def backend(name: str) -> Provider:
        def refused(case: Case, device: str) -> str | None:
            if name == "reference" and case.dtype not in ("float32", "bfloat16"):
                return "plain torch needs a single dtype"
            return why_not(op, name, torch.empty(0, dtype=DTYPES[case.dtype], device=device))

        return Provider(direct(getattr(ops, op), backend=name), backend=name, why_not=refused)

    found = {name: backend(name) for name in BACKENDS}
    compiled = Provider(compiler(whole or getattr(reference, op)), backend="torch.compile", why_not=no_compiler)
    return {"reference": found.pop("reference"), "torch.compile": compiled} | found


def compiler(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """``function``, compiled for the given shapes."""

    def make(*arguments: Any) -> Callable[[], Any]:
        torch.compiler.reset()  # else the compiler silently gives up after about eight shapes
        return functools.partial(torch.compile(function, dynamic=False), *arguments)

    return make


def no_compiler(case: Case, device: str) -> str | None:
    if case.dtype not in ("float32", "bfloat16"):
        return "plain torch needs a single dtype"
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return None if any(map(shutil.which, candidates)) else "it needs a C++ compiler, and none was found"


def cases(dtype: str, *shapes: Mapping[str, int | str], **common: int | str) -> list[Case]:
    """One case per shape, each extended by ``common``."""
    return [Case({**shape, **common}, dtype) for shape in shapes]
