"""Claims on parts of a folder that several processes work on: POSIX locks, which end with their process."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastfg.files import remove_unfinished
from fastfg.study.telling import Say

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)

# A POSIX lock belongs to a process, and is dropped when the process closes any descriptor of the file. So a lock file
# is opened once per process and never closed, and claims within one process are told apart here.
_files: dict[tuple[int, int], int] = {}  # (device, inode): descriptor
_held: set[tuple[int, int, int, int]] = set()  # (process, device, inode, byte)
_guard = threading.Lock()


class Claims:
    """Claims by name on one lock file. At most one process, and one thread in it, holds a name at a time.

    A claim ends when its ``with`` block does or when its process dies, however it dies. On a file system without locks
    every claim of another process succeeds. ``say`` is called once about that.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self.file, self.say = file, say
        self.works = True  # False on a file system without locks

    @contextmanager
    def __call__(self, name: str) -> Iterator[bool]:
        """Claim ``name``. Yields whether this process holds it now; does not wait."""
        mark = self._take(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        try:
            yield mark is not None
        finally:
            if mark is not None:
                self._give_back(mark)

    def _take(self, byte: int) -> tuple[int, int, int, int] | None:
        with _guard:
            device, inode, descriptor = self._open()
            mark = (os.getpid(), device, inode, byte)
            if mark in _held:
                return None
            try:
                if self.works:
                    if fcntl is None:
                        raise OSError(errno.ENOSYS, "this system has no fcntl")
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError as error:
                if error.errno in HELD_ELSEWHERE:
                    return None
                self.works = False
                self.say(
                    f"{self.file}: this file system has no locks ({error.strerror}). Processes that work on this "
                    "folder at the same time may do the same work twice. On a CPU, this changes no result"
                )
            _held.add(mark)
            return mark

    def _give_back(self, mark: tuple[int, int, int, int]) -> None:
        with _guard:
            _held.discard(mark)
            _, device, inode, byte = mark
            if self.works and fcntl is not None:
                fcntl.lockf(_files[device, inode], fcntl.LOCK_UN, 1, byte)

    def _open(self) -> tuple[int, int, int]:
        """Device, inode and descriptor of the lock file."""
        try:
            found = self.file.stat()
        except FileNotFoundError:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            found = os.fstat(descriptor)
            _files[found.st_dev, found.st_ino] = descriptor
        place = (found.st_dev, found.st_ino)
        if place not in _files:
            _files[place] = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        return *place, _files[place]


@contextmanager
def alone(folder: Path, argument: str, say: Say | None = None) -> Iterator[None]:
    """Hold the only lock on ``folder``, which is made. The system releases it when the process ends.

    What killed processes have left of their files is removed. Without locks, several may hold the folder; ``say`` is
    called about that.

    Raises ValueError that names the ``argument`` if another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{argument}: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    claims = Claims(folder / LOCK, warnings.warn if say is None else say)
    with claims("all") as held:
        if not held:
            raise ValueError(
                f"{argument}: expected a folder that no other process writes to, got {folder}, which one does"
            )
        if claims.works:
            remove_unfinished(folder)
        yield
