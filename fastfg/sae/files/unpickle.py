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

from fastfg.sae.files.allowed import (
    DICT,
    ENCODE,
    LOAD_FROM_BYTES,
    Call,
    Name,
    Record,
    checked_key,
    named,
    named_by,
)
from fastfg.sae.files.stored import UnreadableError

MAX_LONG = 64  # bytes of an integer


@dataclass
class Budget:
    """What the pickles of one file may cost, those inside of pickles included.

    Attributes:
        bytes: of the values that are copied: the file's own size, and a little.
        steps: opcodes, a few seconds' worth. streams: pickles.
    """

    bytes: int
    steps: int = 300_000
    streams: int = 256

    def copy(self, n: int) -> None:
        self.bytes -= n
        if self.bytes < 0:
            raise UnreadableError("a pickle that uses the same bytes many times")

    def open(self) -> None:
        self.streams -= 1
        if self.streams < 0:
            raise UnreadableError("a file of too many pickles")

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise UnreadableError("a pickle of too many steps")


class Bounded:
    """A file that refuses to read past its end, before any memory is reserved for it."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end = file, end

    def tell(self) -> int:
        return self.file.tell()

    def read(self, n: int = -1) -> bytes:
        left = self.end - self.file.tell()
        if n > left:
            raise UnreadableError("a pickle that ends in the middle of a value")
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
        """The pickled value. Raises UnreadableError with the reason."""
        try:
            for opcode, argument, _ in pickletools.genops(self.source):  # type: ignore[arg-type]
                self.budget.step()
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            raise UnreadableError(f"a damaged pickle ({type(error).__name__})") from error
        except UnreadableError:
            raise
        except ValueError as error:
            raise UnreadableError(f"a damaged pickle ({str(error)[:100]})") from error
        raise UnreadableError("a pickle without an end")

    def step(self, name: str, argument: Any) -> None:
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in LITERALS:
            if isinstance(argument, int) and argument.bit_length() > 8 * MAX_LONG:
                raise UnreadableError("a pickle with an integer that is too large")
            self.stack.append(argument)
        elif name in STEPS:
            STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise UnreadableError(f"a pickle with the opcode {name}")

    # The stack -----------------------------------------------------------------------------------------------

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise UnreadableError("a damaged pickle (a mark in the place of a value)")
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
            raise UnreadableError("a damaged pickle (items for something that is no dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):
            raise UnreadableError("a damaged pickle (items for something that is no list)")

    # Objects -------------------------------------------------------------------------------------------------

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, (Name, Record)):
            name = function if isinstance(function, Name) else function.name
            raise UnreadableError(f"a call of {name}, and pickled code is never run")
        if not isinstance(function, Call) or not isinstance(arguments, (tuple, list)):
            raise UnreadableError("a call of something that is no function")
        if function is LOAD_FROM_BYTES:
            if self.nested is None or len(arguments) != 1 or not isinstance(arguments[0], bytes):
                raise UnreadableError("a damaged pickle (torch.storage._load_from_bytes)")
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
            raise UnreadableError("an object of something that is no class")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's own attributes are not needed
            raise UnreadableError("a damaged pickle (state for something that has none)")

    def persist(self, key: Any) -> None:
        if self.persistent is None:
            raise UnreadableError("a pickle with references to storages that are not in the file")
        self.stack.append(self.persistent(key))

    def from_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnreadableError("a damaged pickle (a global without a name)")
        self.stack.append(named(module, name))


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


def _dict(vm: Unpickler, _: Any) -> None:
    items = vm.pop_mark()
    vm.stack.append({})
    vm.set_items(items)


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
    "DICT": _dict,
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
    "GLOBAL": lambda vm, text: vm.stack.append(named_by(text)),
    "STACK_GLOBAL": lambda vm, _: vm.from_stack(),
    "REDUCE": _reduce,
    "INST": lambda vm, text: vm.call(named_by(text), vm.pop_mark()),
    "OBJ": _obj,
    "NEWOBJ": _newobj(1),
    "NEWOBJ_EX": _newobj(2),
    "BUILD": lambda vm, _: vm.build(),
    "PERSID": lambda vm, key: vm.persist(key),
    "BINPERSID": lambda vm, _: vm.persist(vm.pop()),
}
