"""What a suite is: cases, providers side by side, the reference that judges them, and the work that sets the floor."""

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
    """One shape in one dtype. "bfloat16-decoder": float32 but for the decoder, where rows are gathered."""

    shape: Mapping[str, int | str]
    dtype: str = "float32"

    def __str__(self) -> str:
        """As pytest names it, without "=", which its -k does not take."""
        return "-".join([*(f"{key}{value}" for key, value in self.shape.items()), self.dtype])

    def __getattr__(self, key: str) -> Any:
        try:
            return self.shape[key]
        except KeyError:
            raise AttributeError(key) from None

    @property
    def element(self) -> int:
        """Bytes of one number of the decoder, or of whatever is read most."""
        return 4 if self.dtype == "float32" else 2

    def generator(self, device: str) -> Callable[..., Tensor]:
        """Seeded normal numbers of this case's dtype on the device: the same for every provider."""
        random = torch.Generator(device).manual_seed(0)
        return lambda *size: torch.randn(*size, generator=random, device=device, dtype=DTYPES[self.dtype])


@dataclass(frozen=True)
class Provider:
    """One way of doing the work.

    Args:
        make: of a case's arguments; prepares what is not to be timed, and returns what is.
        bar: for a way from outside: ``whole`` does all of the work; ``part`` does a part of it, or other work to
            compare with, so its result is not the op's and is not checked.
        backend: what did the work, for the record.
        why_not: of the case and the device: the reason why it can't run, or None.
    """

    make: Callable[..., Callable[[], Any]]
    bar: str = ""
    backend: str = "torch"
    why_not: Callable[[Case, str], str | None] = lambda case, device: None


@dataclass(frozen=True)
class Work:
    """The least that the work takes: ``bytes`` moved and ``flops`` of matrix products (2 a multiply-add)."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Suite:
    """One file's benchmarks.

    Args:
        small, full: the cases of each size.
        arguments: of a case and a device: what every provider is given.
        part: the arguments for the few tokens or images that are compared with ``exact`` in float64.
        pick: of a result and its arguments: the tensors to compare, those of ``part``.
        exact: the reference, on the arguments of ``part``.
        work: of a case; None where no floor is defined.
        tolerance: of the error in float32 (the norm of the difference over that of the exact result).
        beside: of the arguments: a name and what to run in turn with each of fastfg's own providers, for a ratio
            that a drifting machine does not move.
        timed: False for a suite about peak memory, which is measured on a CPU too there.
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
    """The pick of ops that give one row a token: the first ``n`` tokens."""
    return lambda result, arguments: tuple(t[:n] for t in outputs(result))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy with every floating tensor in ``dtype``, also those in modules, lists and dictionaries."""
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
    """The reference, the compiler's version of it, and fastfg's backends.

    ``whole``: the same equations on everything at once, for the compiler where the reference goes by tiles: it would
    unroll these.
    """

    def backend(name: str) -> Provider:
        def refused(case: Case, device: str) -> str | None:
            if name == "reference" and case.dtype not in ("float32", "bfloat16"):
                return "plain torch takes one dtype"
            return why_not(op, name, torch.empty(0, dtype=DTYPES[case.dtype], device=device))

        return Provider(direct(getattr(ops, op), backend=name), backend=name, why_not=refused)

    found = {name: backend(name) for name in BACKENDS}
    compiled = Provider(compiler(whole or getattr(reference, op)), backend="torch.compile", why_not=no_compiler)
    return {"reference": found.pop("reference"), "torch.compile": compiled} | found


def compiler(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """``function`` compiled for these very shapes."""

    def make(*arguments: Any) -> Callable[[], Any]:
        torch.compiler.reset()  # or the compiler would give up after some eight shapes, without a word
        return functools.partial(torch.compile(function, dynamic=False), *arguments)

    return make


def no_compiler(case: Case, device: str) -> str | None:
    if case.dtype not in ("float32", "bfloat16"):
        return "plain torch takes one dtype"
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return None if any(map(shutil.which, candidates)) else "there is no C++ compiler for it"


def cases(dtype: str, *shapes: Mapping[str, int | str], **common: int | str) -> list[Case]:
    """A case for each of the shapes, which share ``common``."""
    return [Case({**shape, **common}, dtype) for shape in shapes]
