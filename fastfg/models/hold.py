"""Hold a model still while it is read: eval mode, parameters without gradients, all put back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

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


_lock = threading.Lock()
_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


@contextmanager
def hold(model: nn.Module, flags: Mapping[str, Any] | None = None) -> Iterator[None]:
    """``model`` in eval mode, its parameters without gradients, and ``flags`` set on the modules that have them.

    Restored when the last holder leaves: counting the holders keeps nested calls, and threads that share a
    model, from restoring too early.
    """
    with _lock:
        held = _held.setdefault(model, _Held())
        held.holders += 1
        for module in model.modules():
            held.set(module, "training", False)
            for name in (flags or {}).keys() & module.__dict__.keys():
                held.set(module, name, (flags or {})[name])
        for parameter in model.parameters():
            held.set(parameter, "requires_grad", False)
    try:
        yield
    finally:
        with _lock:
            held.holders -= 1
            if held.holders == 0:
                held.restore()
                del _held[model]
