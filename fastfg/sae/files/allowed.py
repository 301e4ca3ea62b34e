"""What a pickle's globals stand for: the few functions that it may call, and names that are never imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastfg.sae.files.stored import Odd, Storage, Stored, UnreadableError, short

MAX_TEXT, MAX_PAIRS = 4096, 64  # of what a function of ALLOWED returns
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


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


def checked_key(key: Any) -> Any:
    if not isinstance(key, (str, int, float, bool, type(None))) or (isinstance(key, int) and abs(key) >= 2**63):
        raise UnreadableError(f"a pickle with {short(key)} as a key")
    return key


def named(module: str, name: str) -> Any:
    """What a global stands for: an entry of ``ALLOWED``, or just its name."""
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    return ALLOWED.get((module, name)) or Name(module, name)


def named_by(text: str) -> Any:
    module, _, name = text.partition(" ")
    return named(module, name)


# The functions that a file may call ----------------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored:
    return _of(storage).tensor(offset, shape, stride)


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *rest: Any) -> Stored:
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError("a tensor without a dtype")
    return _of(storage).tensor(offset, shape, stride, dtype)


def _of(storage: Any) -> Storage:
    if not isinstance(storage, Storage):
        raise UnreadableError("a tensor without a storage")
    return storage


def _parameter(data: Any, *rest: Any) -> Any:
    if not isinstance(data, (Stored, Odd)):
        raise UnreadableError("a parameter that is no tensor")
    return data


def _text(*parts: Any) -> str:
    texts = [str(p)[:MAX_TEXT] for p in parts[:MAX_PAIRS] if isinstance(p, (str, int))]
    return "/".join(texts)[:MAX_TEXT]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnreadableError("a damaged pickle (_codecs.encode)")
    return text.encode("latin-1")


def _reconstruct(cls: Any, *rest: Any) -> Record:
    if not isinstance(cls, Name):
        raise UnreadableError("an object of something that is no class")
    return Record(cls)


def _items(pairs: Any = ()) -> dict[Any, Any]:
    if len(pairs) > MAX_PAIRS:
        raise UnreadableError(f"a dict of {len(pairs)} pairs in one call")
    return {checked_key(key): value for key, value in pairs}


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
    "QInt8": torch.int8, "QUInt8": torch.uint8, "QInt32": torch.int32, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
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
