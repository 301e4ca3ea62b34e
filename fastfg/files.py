"""Write files whole or not at all, also on a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors says why a file cannot be written


class UnwrittenError(OSError):
    """A file that cannot be written, with its name and the reason."""


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Context that gives the name under which to write ``file``; at its end, that file becomes ``file``.

    So ``file`` is there as a whole or not at all, whenever the process or the machine stops, and an earlier one stays
    until then. The name is another one each time, so that processes can write the same file at once. One that is
    killed leaves it: see :func:`remove_unfinished`.

    Raises OSError with the file's name if it cannot be written, for example on a full disk.
    """
    hidden = temporary(file)
    try:
        with naming(file):
            yield hidden
            descriptor = os.open(hidden, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            hidden.replace(file)
            _sync_folder(file.parent)
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Context in which an OSError becomes one that names ``file`` as what cannot be written."""
    try:
        yield
    except UnwrittenError:  # of another file, which is part of writing this one
        raise
    except OSError as error:
        what = f"cannot write {file.name}: {error.strerror or error}. What was finished before is kept"
        raise UnwrittenError(errno.EIO if error.errno is None else error.errno, what, str(file.parent)) from None


def write_durably(file: Path, content: bytes) -> None:
    """Write ``content`` to ``file``, as :func:`whole` does it."""
    with whole(file) as hidden:
        hidden.write_bytes(content)


def write_new(file: Path, content: bytes) -> None:
    """Write ``content`` to ``file`` as :func:`whole` does it, unless ``file`` is there: of several processes, one
    writes it.
    """
    hidden = temporary(file)
    try:
        write_durably(hidden, content)
        os.link(hidden, file)  # an error where the file is there
        _sync_folder(file.parent)
    except FileExistsError:
        pass
    except OSError:  # some file systems have no links
        if not file.exists():
            write_durably(file, content)
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


def write_tensors(file: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file as :func:`whole` does it.

    It has the mode of any new file; that of safetensors' own temporary file is 0600. Raises OSError with the file's
    name, as for other files; safetensors' own error has no name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(file) as hidden:
        hidden.touch()
        mode = stat.S_IMODE(hidden.stat().st_mode)  # by the umask, which can't be asked for without changing it
        try:
            save_file(dict(tensors), hidden, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            found = OS_ERROR.search(str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        if stat.S_IMODE(hidden.stat().st_mode) != mode:
            with suppress(OSError):  # a file system without modes
                hidden.chmod(mode)


def read_json(file: Path, *fields: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file unless it has these fields."""
    found: dict[str, Any] = _with_fields(file, _json(file), fields)
    return found


def read_json_list(file: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects in a JSON file, at least one. Raises ValueError that names the file unless each has these fields."""
    found = _json(file)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{file}: expected a list of JSON objects, got {found!r:.80}")
    return [_with_fields(file, one, fields) for one in found]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got a damaged file: {error}") from None


def _with_fields(file: Path, found: Any, fields: Sequence[str]) -> Any:
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {found!r:.80}")
    if missing := [name for name in fields if name not in found]:
        raise ValueError(f"{file}: expected {', '.join(missing)} in it, got {', '.join(found) or 'nothing'}")
    return found


def temporary(file: Path) -> Path:
    """A name for writing ``file``: hidden, and different for every call."""
    return file.with_name(f".{file.name}.{uuid4().hex}.tmp")


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed processes have left of ``name`` in ``folder``. No process may be writing it."""
    for file in folder.glob(f".{name}.*.tmp"):
        file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems do this by themselves and refuse to be told
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
