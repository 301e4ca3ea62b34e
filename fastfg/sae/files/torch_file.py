"""Read what ``torch.save`` and ``pickle.dump`` wrote: zip files, legacy streams and plain pickles of tensors."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import partial
from typing import Any, BinaryIO

from fastfg.sae.files.allowed import StorageType
from fastfg.sae.files.stored import Storage, UnreadableError, check_view, fill, short
from fastfg.sae.files.unpickle import Budget, Unpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of a legacy stream
MAX_NESTED = 2  # pickles inside pickles
MAX_MEMBERS = 10_000
SLACK, RATIO = 1 << 26, 20  # unpacked bytes that a packed file may have: SLACK + RATIO times its own


def limit(packed: int) -> int:
    """The bytes that a packed file may become. Random weights don't get smaller; a bomb is far beyond this."""
    return SLACK + RATIO * packed


def open_zip(file: BinaryIO, size: int) -> zipfile.ZipFile:
    """The zip file, after its members' sizes have been checked. Nothing is unpacked."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise UnreadableError(f"a damaged zip file ({str(error)[:100]})") from error
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise UnreadableError(f"a zip file of {len(members)} members")
    unpacked = sum(member.file_size for member in members)
    if unpacked > limit(size):
        raise UnreadableError(f"a zip file of {size} bytes that would become {unpacked} bytes")
    if len({member.filename for member in members}) != len(members):
        raise UnreadableError("a zip file with several members of the same name")
    return archive


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The member's bytes."""
    buffer = bytearray(archive.getinfo(name).file_size)
    _fill_member(archive, name, memoryview(buffer))
    return bytes(buffer)


def _fill_member(archive: zipfile.ZipFile, name: str, buffer: memoryview) -> None:
    try:
        with archive.open(name) as member:
            fill(member, buffer)
    except UnreadableError:
        raise
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
        raise UnreadableError(f"a damaged zip file ({str(error)[:100]})") from error


def read_zip(archive: zipfile.ZipFile) -> Any:
    """The object in a zip file of ``torch.save``; its tensors are :class:`Stored`."""
    sizes = {member.filename: member.file_size for member in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in sizes if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(roots) != 1:
        raise UnreadableError("a zip file that is neither torch's nor NumPy's")
    root = roots[0]
    order = f"{root}byteorder"
    if order in sizes and read_member(archive, order) != b"little":
        raise UnreadableError("a file of big-endian numbers")
    known: dict[str, Storage] = {}

    def storage(key: Any) -> Storage:
        kind, number, name = _reference(key)
        if name not in known:
            member = f"{root}data/{name}"
            n_bytes = number * (1 if kind.dtype is None else kind.dtype.itemsize)
            if sizes.get(member) != n_bytes:
                raise UnreadableError(f"a storage of {n_bytes} bytes, where the file has {sizes.get(member, 0)}")
            known[name] = Storage(n_bytes, kind.dtype, partial(_fill_member, archive, member))
        return known[name]

    data = read_member(archive, f"{root}data.pkl")
    return Unpickler(io.BytesIO(data), len(data), Budget(2 * len(data)), storage).load()


def read_stream(file: BinaryIO, end: int, budget: Budget | None = None, depth: int = 0) -> Any:
    """The object in a legacy stream of ``torch.save``, or in a plain pickle, from the file's position to ``end``."""
    start = file.tell()
    budget = budget or Budget(2 * (end - start) + 4096)

    def nested(stream: bytes) -> Any:
        if depth >= MAX_NESTED:
            raise UnreadableError("pickles nested too deeply")
        return read_stream(io.BytesIO(stream), len(stream), budget, depth + 1)

    first = Unpickler(file, end, budget, None, nested).load()
    if type(first) is not int or first != MAGIC:
        return first
    if Unpickler(file, end, budget).load() != PROTOCOL:
        raise UnreadableError("a legacy torch file of another protocol")
    system = Unpickler(file, end, budget).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableError("a file of big-endian numbers")
    return _read_legacy(file, end, budget)


def _read_legacy(file: BinaryIO, end: int, budget: Budget) -> Any:
    """The object of a legacy stream, and its storages, which follow in the order of their keys."""
    known: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def storage(key: Any) -> Storage:
        view = key[5] if isinstance(key, tuple) and len(key) == 6 else None
        kind, number, name = _reference(key[:5] if isinstance(key, tuple) else key)
        n_bytes = number * (1 if kind.dtype is None else kind.dtype.itemsize)
        if name not in known:
            known[name] = Storage(n_bytes, kind.dtype, lambda to: _fill_at(file, places, name, to))
        if view is not None:
            raise UnreadableError("a storage that is a view of another one")
        return known[name]

    result = Unpickler(file, end, budget, storage).load()
    keys = Unpickler(file, end, budget).load()
    if not isinstance(keys, list) or len(keys) > len(known) or not all(isinstance(key, str) for key in keys):
        raise UnreadableError("a damaged legacy torch file (its list of storages)")
    for key in keys:
        if key not in known or key in places:
            raise UnreadableError("a damaged legacy torch file (its list of storages)")
        wanted, dtype = known[key].n_bytes, known[key].dtype
        if end - file.tell() < 8:
            raise UnreadableError("a file that ends too early")
        (number,) = struct.unpack("<q", file.read(8))
        if number * (1 if dtype is None else dtype.itemsize) != wanted or wanted > end - file.tell():
            raise UnreadableError(f"a storage of {wanted} bytes, where the file has {end - file.tell()}")
        places[key] = file.tell()
        file.seek(wanted, io.SEEK_CUR)
    if len(places) != len(known):
        raise UnreadableError("a legacy torch file without some of its storages")
    return result


def _fill_at(file: BinaryIO, places: dict[str, int], name: str, buffer: memoryview) -> None:
    file.seek(places[name])
    fill(file, buffer)


def _reference(key: Any) -> tuple[StorageType, int, str]:
    """A persistent id ("storage", type, key, device, number of elements): its type, number and key."""
    if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage":
        raise UnreadableError("a pickle with a reference to something that is no storage")
    kind, name, number = key[1], key[2], key[4]
    if not isinstance(kind, StorageType) or not isinstance(name, str) or type(number) is not int:
        raise UnreadableError(f"a reference to a storage of {short(number)} values")
    check_view(number, 0, (number,), (1,))
    return kind, number, name
