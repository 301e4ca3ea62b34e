"""All uses of private parts of torch, in one place, so that they are easy to test with a new version of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRIED_ON = ("2.11", "2.13")  # the torch versions that fastfg was tested with: 2.11 on a GPU, 2.13 on a CPU

Function = TypeVar("Function", bound=Callable[..., Any])


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` was called for one of ``modules``."""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modules)


def parameters_of(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters of these modules, without those of their parts."""
    return (weight for m in modules for weight in m._parameters.values() if weight is not None)


def buffers_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The buffers of these modules, without those of their parts."""
    return (buffer for m in modules for buffer in m._buffers.values() if buffer is not None)


@contextmanager
def tensors_used() -> Iterator[set[int]]:
    """Context that collects the ids of all tensors that this thread's ops get, views and lists included."""
    used: set[int] = set()

    class Collect(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            used.update(id(one) for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor))
            return func(*args, **(kwargs or {}))

    with Collect():
        yield used


def uncompiled(model: Any) -> Any:
    """The module that was passed to ``torch.compile``, or ``model`` itself if it is not compiled."""
    return getattr(model, "_orig_mod", model)


def hooks_of(model: nn.Module) -> list[Any]:
    """All hooks on calls of ``model`` and of its parts, those registered for every module included."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]
    return found + [hook for kind in kinds for hook in getattr(nn.modules.module, f"_global{kind}").values()]


def saves_elsewhere() -> bool:
    """Whether tensors that autograd saves are being packed by someone, as inside ``torch.utils.checkpoint``."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def made_since(start: Any, end: Any) -> Iterator[Any]:
    """The nodes of autograd's graph from ``end`` back to those made before ``start``."""
    waiting, seen = [end], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and node._sequence_nr() > start._sequence_nr():
            seen.add(node)
            yield node
            waiting.extend(earlier for earlier, _ in node.next_functions)


def multi_head_attention_forward(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` with ``attention`` in place of ``F.scaled_dot_product_attention``.

    A torch-function mode is disabled inside the function, so it does not see the inner call. This runs a copy of the
    function in which two global names are replaced; torch's own function is not changed. The attention weights are
    not returned, because torch calls ``scaled_dot_product_attention`` only without them.
    """
    original = F.multi_head_attention_forward
    names = {"scaled_dot_product_attention": attention, "has_torch_function": lambda *_: False}
    function = FunctionType(original.__code__, original.__globals__ | names, original.__name__, original.__defaults__)
    return function(*args, **kwargs | {"need_weights": False})


def schema_text(op: Any) -> str:
    """The schema of a ``torch.ops`` op, as in ``fastfg::gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor``."""
    return str(op.default._schema)


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """``(a * a_scale) @ (b * b_scale)`` of float8 factors [n, d] and [d, m] in bfloat16, on a GPU's 8-bit units."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)


def constant_when_traced(function: Function) -> Function:
    """Decorator: a traced program treats the result of ``function`` as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but it loads the whole compiler (and triton).
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function
