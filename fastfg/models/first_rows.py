"""Run the last block, from its attention on, only for the tokens that the head reads.

A head with a class token reads one of ``N`` tokens. The keys and values of the last block need all of them; everything
else in this block is needed only for the tokens that are read. So the attention runs for these queries alone. Its
output holds only the first rows. Functions that act on each token separately pass such a tensor on, and the head may
take rows out of it. The results are exact: any other use raises :class:`Unsuited`, and the caller runs the model in
full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from fastfg.models.adapter import Adapter
from fastfg.models.hooks import in_this_thread, is_ours
from fastfg.torch_internals import hooks_of, made_since, saves_elsewhere

FUNCTIONS = (FunctionType, MethodType)
_unsuited: WeakSet[nn.Module] = WeakSet()  # last blocks of models that must run in full
# Those of models whose output was compared, and what their models were made of then
_suited: WeakKeyDictionary[nn.Module, tuple[object, ...]] = WeakKeyDictionary()


class Unsuited(Exception):  # noqa: N818
    """The model uses its last block's tokens otherwise than one by one."""


def first_rows(adapter: Adapter, n_tokens: int, layers: Collection[int]) -> FirstRows | None:
    """The context for a forward of ``adapter``, or None if the model must run in full.

    It must run in full if the head reads patches, if the stream of the last block is in ``layers``, if hooks of the
    user's own may read tokens, and where the attention of the last block is not a plain function.
    """
    last = adapter.blocks[-1]
    opaque = (nn.MultiheadAttention, torch.jit.ScriptModule)
    if adapter.n_rows is None or adapter.meet is not None or len(adapter.blocks) == 1 or last in _unsuited:
        return None
    if len(adapter.blocks) - 1 in layers or any(isinstance(module, opaque) for module in last.modules()):
        return None
    if not all(is_ours(hook) for hook in hooks_of(adapter.model)):
        return None
    return FirstRows(adapter.model, last, n_tokens, adapter.n_rows)


def made_of(model: nn.Module) -> tuple[object, ...]:
    """The parts of ``model`` and the functions that they run, to be compared with those of another time."""
    return tuple(
        (ref(part), type(part), *(id(own) for own in part.__dict__.values() if isinstance(own, FUNCTIONS)))
        for part in model.modules()
    )


class FirstRows(TorchFunctionMode):
    """Context in which ``block`` computes only the first ``n_rows`` of ``n_tokens`` tokens, from its attention on.

    Tensors that hold only these rows have the shape of all tokens as long as the context is active. A hook on their
    gradient gets zeros for the other tokens. Raises :class:`Unsuited` where a function needs the other tokens.
    """

    def __init__(self, model: nn.Module, block: nn.Module, n_tokens: int, n_rows: int) -> None:
        super().__init__()
        self.model, self.block, self.n_tokens, self.n_rows = model, block, n_tokens, n_rows
        self.inside = self.failed = False
        self.held: dict[int, tuple[Tensor, int]] = {}  # by id: the tensor, and its dimension of tokens from the end

    def give_up(self) -> None:
        """Run the model in full from now on."""
        _unsuited.add(self.block)

    def __enter__(self) -> FirstRows:
        self.handles = [
            self.block.register_forward_pre_hook(in_this_thread(self._enter)),
            self.block.register_forward_hook(in_this_thread(self._leave)),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        self.inside = True

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.held:  # in all blocks but the last
            attention = self.inside and func is F.scaled_dot_product_attention
            return self._attention(*args, **kwargs) if attention else func(*args, **kwargs)
        if any(self._holds(value) for value in (*args, *kwargs.values())):
            return self._pass_on(func, args, kwargs)
        return func(*args, **kwargs)

    def _holds(self, value: Any) -> bool:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (tuple, list)):
            return any(self._holds(part) for part in value)
        return id(value) in self.held

    def _hold(self, tensor: Tensor, dim: int) -> Tensor:
        self.held[id(tensor)] = tensor, dim
        return tensor

    def _attention(self, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        if query.ndim != 4 or query.shape[-2] != self.n_tokens or saves_elsewhere():  # a checkpoint runs twice
            return F.scaled_dot_product_attention(query, key, *args, **options)
        out = F.scaled_dot_product_attention(query[..., : self.n_rows, :], key, *args, **options)
        self.attended = out.grad_fn
        return self._hold(out, -2)

    def check(self, output: Tensor, in_full: Callable[[], Tensor]) -> None:
        """Raise :class:`Unsuited` if the model has used its tokens otherwise. To be called after the context.

        No mode sees the inside of an ``autograd.Function``, of a scripted function or of ``torch.func``. So the first
        output of a model is compared with that of the model in full, which ``in_full`` gives.
        """
        if self.failed:  # the model has caught the error
            raise Unsuited
        if not self.held or self._is_suited():
            return
        if any(isinstance(node, BackwardCFunction) for node in made_since(self.attended, output.grad_fn)):
            raise self.unsuited(BackwardCFunction)
        if any(self._holds(value) for module in self.model.modules() for value in vars(module).values()):
            raise self.unsuited("an attribute of the model")
        if not _alike(output.detach(), in_full()):
            raise self.unsuited("another output")
        _suited[self.block] = made_of(self.model)

    def _is_suited(self) -> bool:
        """Whether the output of the model, made of the same parts, was compared before."""
        return _suited.get(self.block) == made_of(self.model)

    def _pass_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        rule = RULES.get(func)
        others = (*(args[1:] if rule is not FirstRows._of_each_number else ()), *kwargs.values())
        if rule is None or any(self._holds(value) for value in others):
            raise self.unsuited(func)
        try:
            return rule(self, func, *args, **kwargs)
        except TypeError:  # arguments that a rule does not know
            raise self.unsuited(func) from None

    @property
    def in_doubt(self) -> bool:
        """Whether an error of the model may come from what it was given here."""
        return self.failed or not self._is_suited()

    def unsuited(self, what: Any) -> Unsuited:
        """The error to raise."""
        self.failed = True
        return Unsuited(getattr(what, "__name__", what))

    # The rules -----------------------------------------------------------------------------------------------

    def _of_each_number(self, func: Any, *args: Any, **options: Any) -> Tensor:
        """A function of numbers, with broadcasting."""
        dims = {self.held[id(t)][1] for t in args if self._holds(t)}
        if len(dims) != 1 or options.get("inplace") or any(isinstance(value, Tensor) for value in options.values()):
            raise self.unsuited(func)
        (dim,) = dims
        return self._hold(func(*(self._rows(t, dim) for t in args), **options), dim)

    def _rows(self, t: Any, dim: int) -> Any:
        """The first rows of ``t``, or ``t`` itself where it is the same for all tokens."""
        if not isinstance(t, Tensor) or self._holds(t) or t.ndim < -dim or t.shape[dim] == 1:
            return t
        if t.shape[dim] != self.n_tokens:
            raise self.unsuited("broadcasting")
        return t.narrow(dim, 0, self.n_rows)

    def _of_each_token(self, func: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """A linear layer, or a norm over the last dimensions."""
        n_dims = 1 if func is F.linear else len(args[0] if args else options["normalized_shape"])
        if not self._holds(x) or self.held[id(x)][1] >= -n_dims:
            raise self.unsuited(func)
        return self._hold(func(x, *args, **options), self.held[id(x)][1])

    def _dropout(self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training:
            raise self.unsuited(func)
        return x

    def _same(self, func: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Another dtype or memory layout."""
        return self._hold(func(x, *args, **options), self.held[id(x)][1])

    def _known(self, func: Any, x: Tensor, *args: Any) -> Any:
        """A property that does not depend on the number of tokens."""
        return func(x, *args)

    def _shape(self, func: Any, x: Tensor, dim: int | None = None) -> Any:
        shape = list(x.shape)
        shape[self.held[id(x)][1]] = self.n_tokens
        return torch.Size(shape) if dim is None or not isinstance(dim, int) else shape[dim]

    def _transpose(self, func: Any, x: Tensor, dim0: int, dim1: int) -> Tensor:
        a, b = (dim - x.ndim if dim >= 0 else dim for dim in (dim0, dim1))
        dim = self.held[id(x)][1]
        return self._hold(x.transpose(a, b), {a: b, b: a}.get(dim, dim))

    def _reshape(self, func: Any, x: Tensor, *sizes: Any) -> Tensor:
        """Only dimensions after the tokens may change."""
        shape = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
        at = x.ndim + self.held[id(x)][1]
        if shape.count(-1) == 1:
            all_tokens = x.numel() // self.n_rows * self.n_tokens
            shape[shape.index(-1)] = all_tokens // max(-math.prod(shape), 1)
        if shape[:at] != list(x.shape[:at]) or len(shape) <= at + 1 or shape[at] != self.n_tokens:
            raise self.unsuited(func)
        shape[at] = self.n_rows
        return self._hold(x.reshape(shape), at - len(shape))

    def _flatten(self, func: Any, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        start, at = start_dim % x.ndim, x.ndim + self.held[id(x)][1]
        if start <= at or end_dim != -1:
            raise self.unsuited(func)
        return self._hold(x.flatten(start), at - start - 1)

    def _chunk(self, func: Any, x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        """Parts of each token."""
        if dim - x.ndim * (dim >= 0) <= self.held[id(x)][1]:
            raise self.unsuited(func)
        return tuple(self._hold(part, self.held[id(x)][1]) for part in x.chunk(chunks, dim))

    def _index(self, func: Any, x: Tensor, index: Any) -> Tensor:
        """Rows that are held: ``x[:, 0]``, ``x[:, 0, :]``, ``x[:, :2]``."""
        every, rows, *rest = index if isinstance(index, tuple) and len(index) > 1 else (None, None)
        whole = all(isinstance(part, slice) and part == slice(None) for part in (every, *rest))
        if self.held[id(x)][1] != 1 - x.ndim or not whole or type(rows) not in (int, slice):
            raise self.unsuited(func)
        found = range(self.n_tokens)[rows]
        wanted = found if isinstance(found, range) else range(found, found + 1)
        if not wanted or max(wanted) >= self.n_rows:
            raise self.unsuited(func)
        return x[:, found] if isinstance(found, int) else x[:, found.start : found.stop : found.step]

    def _hook(self, func: Any, x: Tensor, hook: Callable[[Tensor], None]) -> Any:
        """A hook of fastfg's own on the gradient of all tokens: it does not change it."""
        if not str(getattr(hook, "__module__", "")).startswith("fastfg."):
            raise self.unsuited(func)
        dim = self.held[id(x)][1]
        others = [0, 0] * (-dim - 1) + [0, self.n_tokens - self.n_rows]
        return func(x, lambda g: hook(F.pad(g, others)))


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs [B, n] differ by no more than the rounding of the last block."""
    largest = expected.abs().amax().clamp(min=torch.finfo(expected.dtype).tiny)
    return bool((found - expected).abs().amax() <= torch.finfo(expected.dtype).eps ** 0.75 * largest)


_Tensor: Any = Tensor  # the getters of its properties are functions too

RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), FirstRows._of_each_number),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), FirstRows._of_each_number),
    **dict.fromkeys((F.gelu, F.silu, F.relu, torch.sigmoid, Tensor.sigmoid), FirstRows._of_each_number),
    **dict.fromkeys((F.linear, F.layer_norm, F.rms_norm), FirstRows._of_each_token),
    **dict.fromkeys((Tensor.contiguous, Tensor.to, Tensor.float), FirstRows._same),
    **dict.fromkeys((_Tensor.shape.__get__, Tensor.size), FirstRows._shape),
    **dict.fromkeys((Tensor.dim, _Tensor.ndim.__get__, _Tensor.dtype.__get__), FirstRows._known),
    **dict.fromkeys((_Tensor.requires_grad.__get__, _Tensor.device.__get__), FirstRows._known),
    **dict.fromkeys((Tensor.transpose, torch.transpose), FirstRows._transpose),
    **dict.fromkeys((Tensor.reshape, torch.reshape, Tensor.view), FirstRows._reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), FirstRows._flatten),
    **dict.fromkeys((Tensor.chunk, torch.chunk), FirstRows._chunk),
    F.dropout: FirstRows._dropout,
    Tensor.__getitem__: FirstRows._index,
    Tensor.register_hook: FirstRows._hook,
}
