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
        progress: called with what is complete, whichever process did it: at the start and after each unit.
        max_failures: the largest share of all images that may fail.
        wait: seconds between looks at the units that other processes hold.

    Raises ValueError as soon as more images failed than ``max_failures`` allows. What was finished is kept.
    """
    _check_units(units, work, max_failures)
    store.remove_leftovers()
    try:
        while True:
            store.refresh()
            _tell(store, units, work, progress, max_failures)
            advanced = False
            for unit in _in_turn(store, units):
                if store.missing(unit, *work, refresh=False) and _do_unit(store, unit, work, do):
                    _tell(store, units, work, progress, max_failures)
                    advanced = True
            found = store.progress(units, work)
            if found.done == found.total:
                return
            if not advanced:
                time.sleep(wait)
    finally:
        store.write_failures()


def _do_unit(store: Store, unit: Unit, work: Work, do: Callable[[Unit, Work], tuple[Any, Iterable[Failure]]]) -> bool:
    """Do what is missing of a unit. Returns False if another process holds it or nothing is missing any more."""
    with store.claim(unit.name) as held:
        if not held:
            return False
        store.remove_damaged(unit.name)
        missing = store.missing(unit, *work)
        for part in missing:
            failed = store.failed(unit)
            keys = tuple(key for key in unit.keys if key not in failed)
            rows, failures = do(unit._replace(keys=keys), part) if keys else ([], [])
            store.write(unit, part, rows, [*failed.values(), *failures])
        return bool(missing)


def _tell(
    store: Store,
    units: Sequence[Unit],
    work: Work,
    progress: Callable[[Progress], None] | None,
    max_failures: float,
) -> None:
    """Report what is complete, and stop if too many images have failed."""
    found = store.progress(units, work)
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
