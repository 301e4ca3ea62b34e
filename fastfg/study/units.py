"""The loop of every process that works on a store: take what no other process has, until all is complete."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastfg.study.shards import Failure, Unit, Work
from fastfg.study.store import ERRORS, Progress, Store

UNIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def run_units(
    store: Store,
    units: Sequence[Unit],
    work: Work,
    do: Callable[[Unit, Work], tuple[Any, Iterable[Failure]]],
    *,
    progress: Callable[[Progress], None] | None = None,
    max_failures: float = 1.0,
    wait: float = 0.5,
) -> None:
    """Do what is missing of ``work`` for ``units``. Any number of processes may call this at once, with the same units.

    Each takes the units that no other one holds, in their order. When there are none left, it waits for the units of
    the others and takes over those of processes that have died. It returns when all is complete, and writes
    ``errors.parquet``, also when it ends early.

    Args:
        do: called with a unit, less the images that failed before, and the work to do. Returns the rows and the images
            that failed, see :meth:`Store.write`.
        progress: called with what is complete, whichever process did it: at the start and after each unit. What others
            have done is looked up about once a second, and less often in a folder that takes long to list.
        max_failures: the largest share of all images that may fail.
        wait: seconds between looks at the units that other processes hold.

    Raises ValueError as soon as more images failed than ``max_failures`` allows. What was finished is kept.
    """
    _check_units(units, work, max_failures)
    store.remove_leftovers()
    try:
        while True:
            tally = _Tally(store, units, work)
            _tell(store, units, tally.progress, progress, max_failures)
            advanced = False
            for unit in _in_turn(store, units):
                if unit.name not in tally.missing or not _do_unit(store, unit, work, do):
                    continue
                advanced = True
                tally.count(unit)
                if tally.is_old:
                    tally = _Tally(store, units, work)
                _tell(store, units, tally.progress, progress, max_failures)
            found = store.progress(units, work)
            if found != tally.progress:
                _tell(store, units, found, progress, max_failures)
            if found.done == found.total:
                store.remove_leftovers()  # of processes that died meanwhile
                return
            if not advanced:
                time.sleep(wait)
    finally:
        store.write_failures()


class _Tally:
    """How much of ``work`` is complete, whichever process did it.

    To list the folder and count all units takes longer the more is in it. So it is done from time to time, and in
    between only this process's own units are counted.

    Attributes:
        missing: {name of a unit: how many of its images have failed so far}, for units that are not complete.
    """

    def __init__(self, store: Store, units: Sequence[Unit], work: Work) -> None:
        start = time.monotonic()
        self.store, self.work = store, work
        self.done, self.failed, self.total = 0, 0, sum(len(unit.keys) for unit in units)
        self.missing = dict.fromkeys((unit.name for unit in units), 0)
        store.refresh()
        for unit in units:
            self.count(unit)
        took = time.monotonic() - start  # the first time, also to read the files
        self._next = time.monotonic() + min(max(1.0, 50 * took), 10.0)

    @property
    def is_old(self) -> bool:
        """Whether the work of others should be looked at again."""
        return time.monotonic() > self._next

    @property
    def progress(self) -> Progress:
        return Progress(self.done, self.total, self.failed)

    def count(self, unit: Unit) -> None:
        """Count what is there of a unit that is not complete yet."""
        failed = len(self.store.failed(unit))
        self.failed += failed - self.missing[unit.name]
        self.missing[unit.name] = failed
        if not self.store.missing(unit, *self.work, refresh=False):
            self.done += len(unit.keys)
            del self.missing[unit.name]


def _do_unit(store: Store, unit: Unit, work: Work, do: Callable[[Unit, Work], tuple[Any, Iterable[Failure]]]) -> bool:
    """Do what is missing of a unit. Returns False if another process holds it or nothing is missing any more."""
    with store.claim(unit.name) as held:
        if not held:
            return False
        store.remove_damaged(unit.name)
        missing = store.look_for(unit, work)
        for part in missing:
            failed = store.failed(unit)
            keys = tuple(key for key in unit.keys if key not in failed)
            rows, failures = do(unit._replace(keys=keys), part) if keys else ([], [])
            store.write(unit, part, rows, [*failed.values(), *failures])
        return bool(missing)


def _tell(
    store: Store,
    units: Sequence[Unit],
    found: Progress,
    progress: Callable[[Progress], None] | None,
    max_failures: float,
) -> None:
    """Report what is complete, and stop if too many images have failed."""
    if progress is not None:
        progress(found)
    if found.failed > max_failures * found.total:
        keys = {key for unit in units for key in unit.keys}
        first = next(row for row in store.failures().to_pylist() if row["key"] in keys)
        raise ValueError(
            f"max_failures: expected at most {max_failures:.4g} of {found.total} images to fail, got {found.failed}; "
            f"the first in {store.folder / ERRORS}: {first['path'] or first['key']}: {first['error']}"
        )


def _in_turn(store: Store, units: Sequence[Unit]) -> list[Unit]:
    """The units in the order in which this process tries them: without locks, processes start at different ones."""
    start = 0 if store.locks else os.getpid() * 7919 % len(units)
    return [*units[start:], *units[:start]]


def _check_units(units: Sequence[Unit], work: Work, max_failures: float) -> None:
    if not 0 <= max_failures <= 1:
        raise ValueError(f"max_failures: expected 0 to 1, got {max_failures!r}")
    if not units:
        raise ValueError("units: expected at least one, got none")
    for name, entries in work._asdict().items():
        if not entries or len(set(entries)) < len(entries):
            raise ValueError(f"work: expected {name} that are there once, and at least one, got {entries!r}")
    seen: set[str] = set()
    names: set[str] = set()
    for unit in units:
        if not UNIT_NAME.fullmatch(unit.name) or unit.name in names:
            raise ValueError(f"units: expected names of letters, digits, '_', '-', '.', each once, got {unit.name!r}")
        again = next((key for n, key in enumerate(unit.keys) if key in seen or key in unit.keys[:n]), None)
        if again is not None:
            raise ValueError(f"units: expected each image in one unit and once, got {again!r} again in {unit.name}")
        names.add(unit.name)
        seen.update(unit.keys)
