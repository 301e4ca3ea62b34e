"""A fake GPU ("the card"): its tensors report ``cuda:0``, follow CUDA's rules about devices, and compute on the CPU.

``plugin`` installs the card before torch is first imported. A tensor on the card is a wrapper (:class:`OnCard`) around
a CPU tensor. Each op first checks whether CUDA would accept its arguments, then runs on the wrapped tensors. Dispatch,
autocast and autograd are torch's own, as for a real GPU: the dispatch keys are CUDA's, and the backward pass runs in
the device's own thread. Triton kernels run under the interpreter, and their host code gets tensors on the card. The
card can't be removed again, so use a separate process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

CARD = torch.device("cuda", 0)
TOTAL = 80 * 2**30  # bytes of memory
under_way: list[tuple[Tensor, Tensor]] = []  # copies to the CPU that do not block, and what will arrive
memory = {"free": TOTAL, "allocated": 0, "peak": 0}  # reported by torch.cuda; set by the tests

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}  # the only ways from one device to another
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
NUMBERS = INDEXING | {aten.fill, aten.fill_}  # accept a CPU scalar, as elementwise ops do
LIBRARY = torch.library.Library("aten", "IMPL")


class OnCard(Tensor):
    """``under``, a CPU tensor, as a tensor on the card."""

    under: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # Python code sees no special type

    @staticmethod
    def __new__(cls, under: Tensor) -> OnCard:
        options = {"strides": under.stride(), "storage_offset": under.storage_offset(), "dtype": under.dtype}
        made = Tensor._make_wrapper_subclass(cls, under.shape, device=CARD, **options)
        made.under = under
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # not decomposed when called inside a Triton op, below autograd
            return func.decompose(*args, **kwargs)
        check(func, args, kwargs)
        if func.namespace == "fastfg_triton":  # the host code of the op gets tensors on the card
            return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        if func is aten._scaled_mm.default:
            return OnCard(scaled_mm(*tree_map_only(OnCard, below, args), **tree_map_only(OnCard, below, kwargs)))
        where = kwargs.get("device")
        if where is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        with torch.inference_mode(False):  # else a wrapper made there can't be a view of one from outside
            out = func(*tree_map_only(OnCard, below, args), **tree_map_only(OnCard, below, kwargs))
            if where is not None and where.type == "cpu":
                return _later(out) if kwargs.get("non_blocking") else out
            given = {id(below(t)): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else OnCard(t), out)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.under.tolist()  # torch's own tolist does not support wrappers

    def __repr__(self) -> str:
        return f"OnCard({self.under!r})"


def below(t: Tensor) -> Tensor:
    return t.under if isinstance(t, OnCard) else t


def check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise CUDA's error if ``func`` doesn't accept tensors on these devices, or this generator."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if func.overloadpacket in COPIES:
        return
    first = tensors[0]
    if func.overloadpacket in INDEXING:
        if not isinstance(first, OnCard) and any(isinstance(t, OnCard) for t in tree_leaves(args[1])):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [t for t in tree_leaves((args[0], args[2:])) if isinstance(t, Tensor)]
    numbers = torch.Tag.pointwise in func.tags or func.overloadpacket in NUMBERS
    written = first if func._schema.is_mutable else None
    strays = [t for t in tensors if not isinstance(t, OnCard) and not (numbers and t.ndim == 0 and t is not written)]
    if strays:
        shapes = [list(t.shape) for t in strays]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func} "
            f"got {shapes} on the CPU)"
        )


def _later(out: Tensor) -> Tensor:
    """A copy to the CPU that does not block: its numbers arrive when an event that was recorded later is waited for."""
    under_way.append((out, out.clone()))
    return out.fill_(float("nan"))


class Event:
    """What fastfg uses of ``torch.cuda.Event``."""

    def record(self, stream: Any = None) -> None:
        self.copies = list(under_way)

    def synchronize(self) -> None:
        for out, values in self.copies:
            out.copy_(values)
        under_way[:] = [copy for copy in under_way if not any(copy is done for done in self.copies)]


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: None, scale_result: None, out_dtype: torch.dtype
) -> Tensor:
    """``torch._scaled_mm`` with one scale per row and column, and the requirements of a GPU on its arguments."""
    if not (a.is_contiguous() and b.mT.is_contiguous()):
        raise RuntimeError("_scaled_mm: expected a row-major and a column-major factor")
    if b.shape[0] % 16 or b.shape[1] % 16:
        raise RuntimeError(f"_scaled_mm: expected sides that are multiples of 16, got {list(b.shape)}")
    for scale, shape in ((scale_a, [len(a), 1]), (scale_b, [1, b.shape[1]])):
        if list(scale.shape) != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise RuntimeError(f"_scaled_mm: expected contiguous float32 scales {shape}, got {list(scale.shape)}")
    if out_dtype != torch.bfloat16:
        raise RuntimeError("_scaled_mm: only bfloat16 comes out of a product scaled by rows")
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


# Installation -------------------------------------------------------------------------------------------------------


def insert_card() -> None:
    """Make torch use the card. ``card.cpp`` must be loaded before torch (see ``plugin``)."""
    if torch.accelerator.current_accelerator() != torch.device("cuda"):
        raise RuntimeError("the card came too late: torch had looked for one already")
    import tests.kernels.interpreter  # noqa: F401  fixes the interpreter

    LIBRARY.impl("empty.memory_format", _empty, "CUDA")  # all factories use these two
    LIBRARY.impl("empty_strided", _empty_strided, "CUDA")
    LIBRARY.impl("copy_", _copy, "CUDA")  # for torch.tensor, which bypasses the Python dispatch
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to("cuda") changes the tensors' type
    _answer_as_a_card()
    _launch_from_the_card()


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return OnCard(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return OnCard(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    below(to).copy_(below(source))
    return to


def _answer_as_a_card() -> None:
    """The functions of ``torch.cuda`` that fastfg calls, with the answers of an H100."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=TOTAL, multi_processor_count=132
    )

    def peaks(device: Any = None) -> None:
        memory["peak"] = memory["allocated"]

    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: None,
        "Event": Event,
        "mem_get_info": lambda device=None: (memory["free"], TOTAL),
        "memory_allocated": lambda device=None: memory["allocated"],
        "memory_reserved": lambda device=None: memory["allocated"],
        "max_memory_allocated": lambda device=None: memory["peak"],
        "reset_peak_memory_stats": peaks,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()


def _launch_from_the_card() -> None:
    """Triton's interpreter accepts only tensors on the card, as Triton's launcher accepts only CUDA tensors."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_from_the_card(self: Any, *args: Any, **kwargs: Any) -> None:
        for where, given in (*enumerate(args), *kwargs.items()):
            if isinstance(given, Tensor) and not isinstance(given, OnCard):
                raise ValueError(f"Pointer argument (at {where}) cannot be accessed from Triton (cpu tensor?)")
        launch(self, *map(below, args), **{name: below(given) for name, given in kwargs.items()})

    GridExecutor.__call__ = launch_from_the_card
