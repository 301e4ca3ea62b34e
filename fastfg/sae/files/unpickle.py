"""Read a pickle as data. Nothing is imported and nothing is called, except the few functions of ``ALLOWED``.

:func:`pickletools.genops` splits the stream into opcodes, and :class:`Unpickler` follows them on a stack of its own.
An object of an unknown class becomes a :class:`Record`, which has its name and its fields. A call of a function that is
not in ``ALLOWED`` is refused, with its name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from fastfg.sae.files.stored import Odd, Refused, Storage, Stored, short

MAX_LONG = 64  # bytes of an integer
MAX_TEXT, MAX_PAIRS = 4096, 64  # of what a function of ALLOWED returns
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass
class Budget:
    """What the pickles of one file may cost, those inside of pickles included.

    Attributes:
        bytes: of the values that are copied: the file's own size, and a little.
        steps: opcodes, a few seconds' worth. streams: pickles.
    """

    bytes: int
    steps: int = 3_000_000
    streams: int = 256

    def copy(self, n: int) -> None:
        self.bytes -= n
        if self.bytes < 0:
            raise Refused("a pickle that uses the same bytes many times")

    def open(self) -> None:
        self.streams -= 1
        if self.streams < 0:
            raise Refused("a file of too many pickles")

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Refused("a pickle of too many steps")


@dataclass(frozen=True)
class Name:
    """A global that a pickle names: a class or a function. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


@dataclass(eq=False, repr=False)
class Record:
    """An object of a class that is not known here: the class's name and the object's fields."""

    name: Name
    state: Any = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields by name; empty for an object that has none."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return {k: v for k, v in state.items() if isinstance(k, str)} if isinstance(state, dict) else {}


@dataclass(frozen=True)
class StorageType:
    """``torch.FloatStorage`` and the like. The dtype is None for bytes without a type."""

    dtype: torch.dtype | None


class Call:
    """A function of ``ALLOWED``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Bounded:
    """A file that refuses to read past its end, before any memory is reserved for it."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end = file, end

    def tell(self) -> int:
        return self.file.tell()

    def read(self, n: int = -1) -> bytes:
        left = self.end - self.file.tell()
        if n > left:
            raise Refused("a pickle that ends in the middle of a value")
        return self.file.read(left if n < 0 else n)

    def readline(self) -> bytes:
        return self.file.readline(min(self.end - self.file.tell(), 1 << 16))


class Unpickler:
    """Reads one pickle from ``file``, which is then behind its last opcode.

    Args:
        end: position at which the file's readable part ends.
        budget: of the file, which all its pickles share.
        persistent: what a persistent id stands for; None if the pickle may have none.
        nested: reads the bytes of a torch stream that is inside the pickle; None if there may be none.
    """

    def __init__(
        self,
        file: BinaryIO,
        end: int,
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
        nested: Callable[[bytes], Any] | None = None,
    ) -> None:
        budget.open()
        self.source, self.budget = Bounded(file, end), budget
        self.persistent, self.nested = persistent, nested
        self.stack: list[Any] = []
        self.marks: list[int] = []  # positions in the stack
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The pickled value. Raises Refused with the reason."""
        try:
            for opcode, argument, _ in pickletools.genops(self.source):  # type: ignore[arg-type]
                self.budget.step()
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            raise Refused(f"a damaged pickle ({type(error).__name__})") from error
        except Refused:
            raise
        except ValueError as error:
            raise Refused(f"a damaged pickle ({str(error)[:100]})") from error
        raise Refused("a pickle without an end")

    def step(self, name: str, argument: Any) -> None:
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in LITERALS:
            if isinstance(argument, int) and argument.bit_length() > 8 * MAX_LONG:
                raise Refused("a pickle with an integer that is too large")
            self.stack.append(argument)
        elif name in STEPS:
            STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"a pickle with the opcode {name}")

    # The stack -----------------------------------------------------------------------------------------------

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise Refused("a damaged pickle (a mark in the place of a value)")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def top(self) -> Any:
        return self.stack[-1]

    def tuple_of(self, n: int) -> None:
        items = [self.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(items)))

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, which alternate in ``items``, into the dict or the record at the top."""
        target = self.top()
        if isinstance(target, Record):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Refused("a damaged pickle (items for something that is no dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):
            raise Refused("a damaged pickle (items for something that is no list)")

    # Objects -------------------------------------------------------------------------------------------------

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Name):
            raise Refused(f"a call of {function}, and pickled code is never run")
        if not isinstance(function, Call) or not isinstance(arguments, (tuple, list)):
            raise Refused("a call of something that is no function")
        if function is LOAD_FROM_BYTES:
            if self.nested is None or len(arguments) != 1 or not isinstance(arguments[0], bytes):
                raise Refused("a damaged pickle (torch.storage._load_from_bytes)")
            self.budget.copy(len(arguments[0]))
            self.stack.append(self.nested(arguments[0]))
            return
        if function is ENCODE:
            self.budget.copy(len(arguments[0]))
        self.stack.append(function.function(*arguments))

    def new(self, cls: Any) -> None:
        if isinstance(cls, Call) and cls is DICT:
            self.stack.append({})
        elif isinstance(cls, Name):
            self.stack.append(Record(cls))
        else:
            raise Refused("an object of something that is no class")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's own attributes are not needed
            raise Refused("a damaged pickle (state for something that has none)")

    def persist(self, key: Any) -> None:
        if self.persistent is None:
            raise Refused("a pickle with references to storages that are not in the file")
        self.stack.append(self.persistent(key))

    def from_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("a damaged pickle (a global without a name)")
        self.stack.append(named(module, name))


def _key(key: Any) -> Any:
    if not isinstance(key, (str, int, float, bool, type(None))) or (isinstance(key, int) and abs(key) >= 2**63):
        raise Refused(f"a pickle with {short(key)} as a key")
    return key


def named(module: str, name: str) -> Any:
    """What a global stands for: an entry of ``ALLOWED``, or just its name."""
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    return ALLOWED.get((module, name)) or Name(module, name)


def _of_text(text: str) -> Any:
    module, _, name = text.partition(" ")
    return named(module, name)


# The functions that a file may call ----------------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored:
    return _of(storage).tensor(offset, shape, stride)


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *rest: Any) -> Stored:
    if not isinstance(dtype, torch.dtype):
        raise Refused("a tensor without a dtype")
    return _of(storage).tensor(offset, shape, stride, dtype)


def _of(storage: Any) -> Storage:
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    return storage


def _parameter(data: Any, *rest: Any) -> Any:
    if not isinstance(data, (Stored, Odd)):
        raise Refused("a parameter that is no tensor")
    return data


def _text(*parts: Any) -> str:
    texts = [str(p)[:MAX_TEXT] for p in parts[:MAX_PAIRS] if isinstance(p, (str, int))]
    return "/".join(texts)[:MAX_TEXT]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("a damaged pickle (_codecs.encode)")
    return text.encode("latin-1")


def _reconstruct(cls: Any, *rest: Any) -> Record:
    if not isinstance(cls, Name):
        raise Refused("an object of something that is no class")
    return Record(cls)


def _items(pairs: Any = ()) -> dict[Any, Any]:
    if len(pairs) > MAX_PAIRS:
        raise Refused(f"a dict of {len(pairs)} pairs in one call")
    return {_key(key): value for key, value in pairs}


def _list(items: Any = ()) -> Any:
    return items if isinstance(items, (list, tuple)) else []


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(sizes[:MAX_PAIRS])


LOAD_FROM_BYTES = Call(lambda stream: None)
DICT, ENCODE = Call(_items), Call(_encode)
_TEXT, _LIST, _RECORD = Call(_text), Call(_list), Call(_reconstruct)
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): DICT,
    ("builtins", "dict"): DICT,
    ("__builtin__", "dict"): DICT,
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Call(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_parameter),
    ("torch._utils", "_rebuild_sparse_tensor"): Call(lambda layout, *rest: Odd(f"{_text(layout)} tensor")),
    ("torch._utils", "_rebuild_qtensor"): Call(lambda *rest: Odd("a quantized tensor")),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): Call(lambda *rest: Odd("a meta tensor")),
    ("torch.storage", "_load_from_bytes"): LOAD_FROM_BYTES,
    ("torch.storage", "UntypedStorage"): StorageType(None),
    ("torch.storage", "TypedStorage"): StorageType(None),
    ("torch", "UntypedStorage"): StorageType(None),
    ("torch.serialization", "_get_layout"): _TEXT,
    ("torch", "per_tensor_affine"): Name("torch", "per_tensor_affine"),
    ("torch", "device"): _TEXT,
    ("torch", "Size"): Call(_size),
    ("_codecs", "encode"): ENCODE,
    ("builtins", "set"): _LIST,
    ("__builtin__", "set"): _LIST,
    ("builtins", "frozenset"): _LIST,
    ("copyreg", "_reconstructor"): _RECORD,
    ("copy_reg", "_reconstructor"): _RECORD,
    ("copyreg", "__newobj__"): _RECORD,
    **{("pathlib", kind): _TEXT for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")},
    **{("pathlib._local", kind): _TEXT for kind in ("PosixPath", "WindowsPath", "Path")},
    **{("torch", f"{kind}Storage"): StorageType(dtype) for kind, dtype in _STORAGES.items()},
}

# The opcodes ---------------------------------------------------------------------------------------------------------

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
}  # fmt: skip


def _put(vm: Unpickler, index: Any) -> None:
    vm.memo[len(vm.memo) if index is None else index] = vm.top()


def _reduce(vm: Unpickler, _: Any) -> None:
    arguments, function = vm.pop(), vm.pop()
    vm.call(function, arguments)


def _obj(vm: Unpickler, _: Any) -> None:
    function, *arguments = vm.pop_mark()
    vm.call(function, arguments)


def _newobj(n_arguments: int) -> Callable[[Unpickler, Any], None]:
    def step(vm: Unpickler, _: Any) -> None:
        *_arguments, cls = [vm.pop() for _ in range(n_arguments + 1)]
        vm.new(cls)

    return step


def _setitem(vm: Unpickler, _: Any) -> None:
    value, key = vm.pop(), vm.pop()
    vm.set_items([key, value])


STEPS: dict[str, Callable[[Unpickler, Any], Any]] = {
    "MARK": lambda vm, _: vm.marks.append(len(vm.stack)),
    "POP": lambda vm, _: vm.marks.pop() if vm.marks and vm.marks[-1] == len(vm.stack) else vm.stack.pop(),
    "POP_MARK": lambda vm, _: vm.pop_mark(),
    "DUP": lambda vm, _: vm.stack.append(vm.top()),
    "EMPTY_LIST": lambda vm, _: vm.stack.append([]),
    "EMPTY_DICT": lambda vm, _: vm.stack.append({}),
    "EMPTY_SET": lambda vm, _: vm.stack.append([]),
    "LIST": lambda vm, _: vm.stack.append(vm.pop_mark()),
    "FROZENSET": lambda vm, _: vm.stack.append(vm.pop_mark()),
    "TUPLE": lambda vm, _: vm.stack.append(tuple(vm.pop_mark())),
    "TUPLE1": lambda vm, _: vm.tuple_of(1),
    "TUPLE2": lambda vm, _: vm.tuple_of(2),
    "TUPLE3": lambda vm, _: vm.tuple_of(3),
    "DICT": lambda vm, _: (items := vm.pop_mark(), vm.stack.append({}), vm.set_items(items)),
    "SETITEM": _setitem,
    "SETITEMS": lambda vm, _: vm.set_items(vm.pop_mark()),
    "APPEND": lambda vm, _: vm.append([vm.pop()]),
    "APPENDS": lambda vm, _: vm.append(vm.pop_mark()),
    "ADDITEMS": lambda vm, _: vm.append(vm.pop_mark()),
    "GET": lambda vm, index: vm.stack.append(vm.memo[index]),
    "BINGET": lambda vm, index: vm.stack.append(vm.memo[index]),
    "LONG_BINGET": lambda vm, index: vm.stack.append(vm.memo[index]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _put,
    "GLOBAL": lambda vm, text: vm.stack.append(_of_text(text)),
    "STACK_GLOBAL": lambda vm, _: vm.from_stack(),
    "REDUCE": _reduce,
    "INST": lambda vm, text: vm.call(_of_text(text), vm.pop_mark()),
    "OBJ": _obj,
    "NEWOBJ": _newobj(1),
    "NEWOBJ_EX": _newobj(2),
    "BUILD": lambda vm, _: vm.build(),
    "PERSID": lambda vm, key: vm.persist(key),
    "BINPERSID": lambda vm, _: vm.persist(vm.pop()),
}
