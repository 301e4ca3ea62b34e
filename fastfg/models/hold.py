"""Hold a model still while it is read: eval mode, parameters without gradients, all put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _Held:
    """What a model was like before the first of its present holders came."""

    def __init__(self) -> None:
        self.holders = 0
        self.before: list[tuple[Any, str, Any]] = []  # (module or parameter, attribute, value)

    def set(self, thing: Any, attribute: str, value: Any) -> None:
        before = getattr(thing, attribute)
        if before != value:
            self.before.append((thing, attribute, before))
            setattr(thing, attribute, value)

    def restore(self) -> None:
        for thing, attribute, value in reversed(self.before):
            setattr(thing, attribute, value)


def _compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was asked for the model or a part of it."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


def _eager() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written: a compiled graph has no hooks and no calls to meet."""
    return torch.compiler.set_stance("force_eager")


_lock = threading.Lock()
_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


@contextmanager
def hold(model: nn.Module, flags: Iterable[tuple[Any, str, Any]] = ()) -> Iterator[None]:
    """``model`` in eval mode, its parameters without gradients, and ``flags`` (object, attribute, value) set.

    Restored when the last holder leaves: counting the holders keeps nested calls, and threads that share a
    model, from restoring too early.
    """
    with _lock:
        held = _held.setdefault(model, _Held())
        held.holders += 1
        for module in model.modules():
            held.set(module, "training", False)
        for parameter in model.parameters():
            held.set(parameter, "requires_grad", False)
        for thing, attribute, value in flags:
            held.set(thing, attribute, value)
    try:
        with _eager() if _compiled(model) else nullcontext():
            yield
    finally:
        with _lock:
            held.holders -= 1
            if held.holders == 0:
                held.restore()
                del _held[model]
