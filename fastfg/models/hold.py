"""Hold a model still while it is read: eval mode and no parameter gradients. Everything is restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastfg.models.hooks import reading
from fastfg.torch_internals import is_compiled, parameters_of


class _Held:
    """One held attribute of one object: its original value, its held value, and the number of holders."""

    __slots__ = ("attribute", "before", "holders", "thing", "value")

    def __init__(self, thing: Any, attribute: str, value: Any) -> None:
        self.thing, self.attribute, self.value = thing, attribute, value
        self.before = getattr(thing, attribute)
        self.holders = 0

    def set(self, value: Any) -> None:
        if getattr(self.thing, self.attribute) == value:
            return
        made_in_inference_mode = isinstance(self.thing, Tensor) and self.thing.is_inference()
        with torch.inference_mode() if made_in_inference_mode else nullcontext():  # else torch refuses
            setattr(self.thing, self.attribute, value)


_lock = threading.Lock()
_held: dict[tuple[int, str], _Held] = {}  # by the object's id; the entry keeps the object alive
_eager: list[Any] = []  # one entry per holder of a compiled model; the first entry restores the stance


@contextmanager
def hold(model: nn.Module, flags: Iterable[tuple[Any, str, Any]] = ()) -> Iterator[None]:
    """Context that puts ``model`` in eval mode without parameter gradients, and sets ``flags``.

    ``flags`` are (object, attribute, value) triples. Each attribute is restored when its last holder leaves. Holders
    may be nested or in several threads, and their models may share parts. Meanwhile compiled parts run in eager mode.

    Raises RuntimeError if another holder needs another value of the same attribute.
    """
    modules = list(model.modules())
    wanted: list[tuple[Any, str, Any]] = [(module, "training", False) for module in modules]
    wanted += [(weight, "requires_grad", False) for weight in parameters_of(modules)]
    with ExitStack() as stack:
        taken: list[tuple[int, str]] = []
        stack.callback(_give_back, taken)
        _take((*wanted, *flags), taken)
        if is_compiled(modules):
            _take_eager(stack)
        stack.enter_context(reading())
        yield


def _take(wanted: Iterable[tuple[Any, str, Any]], taken: list[tuple[int, str]]) -> None:
    """Hold the attributes of ``wanted`` (object, attribute, value), and add their keys to ``taken``."""
    with _lock:
        for thing, attribute, value in wanted:
            key = (id(thing), attribute)
            held = _held.get(key) or _Held(thing, attribute, value)
            if held.value != value:
                raise RuntimeError(
                    f"{attribute}: expected {value!r} while the model is read, but another reader of the same "
                    f"{type(thing).__name__} holds it at {held.value!r}"
                )
            held.set(value)
            held.holders += 1
            _held[key] = held
            taken.append(key)


def _give_back(taken: list[tuple[int, str]]) -> None:
    with _lock, ExitStack() as restored:  # if one attribute can't be restored, the others are
        for key in taken:
            held = _held[key]
            held.holders -= 1
            if held.holders == 0:
                del _held[key]
                if held.before != held.value:
                    restored.callback(held.set, held.before)


def _take_eager(stack: ExitStack) -> None:
    """Run compiled parts in eager mode, because compiled graphs run no hooks. This affects the whole process."""
    with _lock:
        _eager.append(None if _eager else torch.compiler.set_stance("force_eager"))
    stack.callback(_give_back_eager)


def _give_back_eager() -> None:
    with _lock:
        if len(_eager) == 1:
            _eager[0].__exit__(None, None, None)
        _eager.pop()
