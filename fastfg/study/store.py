"""Results of many images in a folder that any number of processes write to at once, and can be killed at any moment."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastfg.files import read_json, write_durably
from fastfg.study.claims import LOCK, Claims
from fastfg.study.shards import (
    KEYS,
    DamagedError,
    Failure,
    Shard,
    Unit,
    Work,
    check_rows,
    look_into_shard,
    measures_of,
    read_shard,
    schema,
    write_shard,
)

COLUMNS = {"target": "int64", "score": "float64", "error": "string"}
RECIPE = "recipe.json"
ERRORS = "errors.parquet"
ERROR_COLUMNS = ("path", "key", "error")


class Progress(NamedTuple):
    """Images whose work is complete or that failed (``done``), of ``total``; ``failed`` of them failed."""

    done: int
    total: int
    failed: int


class Store:
    """A folder with the results of units of images, in ``shards/``, and ``errors.parquet`` with images that failed.

    A result is a row per image, variant and measure. Each unit's rows are written at once, as one file that is there as
    a whole or not at all. Nothing is written before :meth:`claim` or :meth:`write`, so that a read-only folder can be
    read.

    Args:
        folder: new, or one that an earlier run has made.
        name: of these results, where the folder holds several; their shards are in ``shards/NAME/``.
        columns: {name: pyarrow's name of its type}, the columns beside key, variant and measure.
        recipe: what the results depend on beside images, variants and measures, such as the model's weights and the
            seed. It is kept beside the shards. Raises ValueError if the folder has another, and names the difference.
        failed: images that failed before these results, such as in training. They are listed with the others.
        splits: {key: split} of all images; the lists of images that failed then have the column ``split``.
        say: called with a line about damaged files and missing locks; None: :func:`warnings.warn`.

    >>> import tempfile
    >>> from fastfg.study.store import Store, Unit, Work
    >>> from fastfg.study.units import run_units
    >>> units = [Unit("test-0", ("a", "b")), Unit("test-1", ("c",))]
    >>> def do(unit, work):
    ...     rows = [
    ...         {"key": key, "variant": variant, "measure": measure, "target": 0, "score": 0.5, "error": None}
    ...         for key in unit.keys for variant in work.variants for measure in work.measures
    ...     ]
    ...     return rows, []
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Store(folder)
    ...     run_units(store, units, Work(("vanilla",), ("saco", "srg")), do)
    ...     store.read().num_rows
    6
    """

    def __init__(
        self,
        folder: str | Path,
        name: str = "",
        *,
        columns: Mapping[str, str] = COLUMNS,
        recipe: Mapping[str, Any] | None = None,
        failed: Iterable[Failure] = (),
        splits: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.columns = Path(folder), dict(columns)
        self._failed_before, self._splits = tuple(failed), splits
        self.shards = self.folder / "shards" / name
        self.say = say or (lambda text: warnings.warn(text, stacklevel=3))
        self._claims = Claims(self.shards / LOCK, self.say)
        self._known: dict[str, Shard | None] = {}  # {file name: what is in it, None if it is damaged}
        self._damaged: set[str] = set()  # the names of damaged files
        self._by_unit: dict[str, dict[str, Shard]] = {}  # {unit: {file name: what is in it}}, those of the sound files
        self._made = False
        self._recipe = None if recipe is None else json.loads(json.dumps(recipe))
        self._check_recipe()

    def start(self) -> None:
        """Make the folder. Raises ValueError if it was made since, for another recipe."""
        self._make()

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claim a unit, without waiting. Yields whether this process has it now. A process that dies frees its own."""
        self._make()
        with self._claims(name) as held:
            yield held

    def remove_leftovers(self) -> None:
        """Remove the hidden files that processes have left that died while they wrote."""
        for file in self.shards.glob(".*-*.tmp"):
            with self.claim(_unit_of(file.name[1:])) as held:
                if held:
                    self._remove_hidden([file])

    @property
    def locks(self) -> bool:
        """False once the folder's file system was found to have no locks."""
        return self._claims.works

    def missing(
        self, unit: Unit, variants: Sequence[str], measures: Sequence[str], *, refresh: bool = True
    ) -> list[Work]:
        """What is still to do for ``unit``, as rectangles of variants and measures, by the files that are there now.

        ``refresh=False`` goes by the files that were there at the last look. Raises ValueError if the folder has
        results of other images under the unit's name.
        """
        if refresh:
            self.refresh()
        return self._missing(unit, Work(tuple(variants), tuple(measures)))

    def look_for(self, unit: Unit, work: Work) -> list[Work]:
        """What is missing of ``work`` for a unit that this process has claimed.

        Other processes that do the same work write files of the same names. Only these are looked for, as to list a
        folder takes longer the more is in it.
        """
        while True:
            missing = self._missing(unit, work)
            names = [Shard(unit.name, unit.keys, *part).file_name for part in missing]
            new = [name for name in names if name not in self._known and (self.shards / name).exists()]
            if not new:
                return missing
            for name in new:
                self._look(name)

    def failed(self, unit: Unit) -> dict[str, Failure]:
        """{key: failure} of the images of ``unit`` that failed before. They are not tried again."""
        shards = self._by_unit.get(unit.name, {}).values()
        return {failure.key: failure for shard in shards for failure in shard.failures}

    def write(self, unit: Unit, work: Work, rows: Any, failures: Iterable[Failure] = ()) -> Path:
        """Write the results of ``work`` for all images of ``unit``. Returns the file.

        Args:
            rows: a pyarrow table, or a list of {column: value}: for each image that has not failed, each variant and
                each measure one row, or several rows whose measures start with the measure and a slash, such as
                ``curve/3``.
            failures: images of the unit without rows.

        Raises ValueError that names the first row that is missing, unknown or there twice, and OSError if the file
        cannot be written, for example on a full disk.
        """
        import pyarrow as pa

        own, order = schema(self.columns), [(name, "ascending") for name in KEYS]
        table = rows.select(own.names).cast(own) if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, own)
        table = table.combine_chunks().sort_by(order)
        listed = tuple(sorted(Failure(*failure) for failure in failures))
        shard = Shard(unit.name, unit.keys, work.variants, work.measures, listed)
        check_rows(shard, table)
        self._make()
        file = write_shard(self.shards, shard, table)
        self._know(file.name, shard)
        return file

    def read(
        self,
        *,
        units: Iterable[str] | None = None,
        variants: Iterable[str] | None = None,
        measures: Iterable[str] | None = None,
    ) -> Any:
        """One pyarrow table of all rows, or of some units, variants and measures, by key, variant and measure.

        The table is the same for every number of processes and every history of kills. Images that failed have no
        rows, see :meth:`failures`. Raises ValueError for a damaged file.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        self.refresh()
        wanted, only = (None if names is None else set(names) for names in (units, variants))
        taken: set[tuple[str, str, str]] = set()
        tables = []
        for name, shard in sorted(self._known.items()):
            if wanted is not None and _unit_of(name) not in wanted:
                continue
            if shard is None:
                raise ValueError(f"{self.shards / name}: damaged. The command that made it makes it again")
            new = {cell for cell in shard.cells if (shard.unit, *cell) not in taken}  # twice only without locks
            taken.update((shard.unit, *cell) for cell in new)
            table = read_shard(self.shards / name, self.columns)[1]
            tables.append(table if new == shard.cells else _only(table, new))
        table = pa.concat_tables(tables) if tables else schema(self.columns).empty_table()
        if only is not None:
            table = table.filter(pc.is_in(table["variant"], pa.array(sorted(only), pa.string())))
        if measures is not None:
            kept = set(measures)
            mask = [not kept.isdisjoint(measures_of(measure)) for measure in table["measure"].to_pylist()]
            table = table.filter(pa.array(mask, pa.bool_()))
        return table.combine_chunks().sort_by([(name, "ascending") for name in KEYS]).combine_chunks()

    def failures(self) -> Any:
        """The images that failed, as a pyarrow table in the order of key.

        Its columns are path, key, error, and split where the store knows the splits.
        """
        import pyarrow as pa

        self.refresh()
        found = {failure.key: failure for failure in self._failed_before}
        found |= {failure.key: failure for s in self._known.values() if s is not None for failure in s.failures}
        listed = [found[key] for key in sorted(found)]
        columns = {name: [getattr(f, name) for f in listed] for name in ERROR_COLUMNS}
        if self._splits is not None:
            columns["split"] = [self._splits[f.key] for f in listed]
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})

    def write_failures(self) -> Path | None:
        """Write ``errors.parquet`` if images have failed. Returns the file, or None."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table, file = self.failures(), self.folder / ERRORS
        if not len(table):
            if file.exists():
                file.unlink()
            return None
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        with self._alone(file):
            write_durably(file, buffer.getvalue().to_pybytes())
        return file

    def forget_failures(self) -> int:
        """Remove the results of units in which images failed, to try them again. Returns the number of units.

        The other images of these units are computed again with them: what an image is computed together with can change
        its last bits.
        """
        self.refresh()
        return self._remove({shard.unit for shard in self._known.values() if shard is not None and shard.failures})

    def forget_where(self, lost: Callable[[Unit, Collection[str]], bool], units: Iterable[Unit]) -> int:
        """Remove the results of ``units`` for which ``lost(unit, keys of failed images)``. Returns their number."""
        return self._remove({u.name for u in units if self._by_unit.get(u.name) and lost(u, self.failed(u))})

    def forget_others(self, units: Iterable[Unit]) -> int:
        """Remove the results of all units but ``units``. Returns the number of units that are removed."""
        self.refresh()
        kept = {unit.name for unit in units}
        return self._remove({shard.unit for shard in self._known.values() if shard is not None} - kept)

    def progress(self, units: Sequence[Unit], work: Work) -> Progress:
        """How much of ``work`` is complete in the folder, whoever did it, in images."""
        self.refresh()
        done = sum(len(unit.keys) for unit in units if not self._missing(unit, work))
        failed = sum(len(self.failed(unit)) for unit in units)
        return Progress(done, sum(len(unit.keys) for unit in units), failed)

    def refresh(self) -> None:
        """Look at the files that are new since the last time."""
        found = {}
        if self.shards.is_dir():
            with os.scandir(self.shards) as entries:
                found = {e.name: e for e in entries if e.name.endswith(".parquet") and not e.name.startswith(".")}
        for gone in self._known.keys() - found.keys():
            self._forget(gone)
        for name in sorted(found):
            if self._known.get(name) is None:  # a damaged file may have been replaced; a sound one does not change
                self._look(name)

    def remove_damaged(self, unit: str) -> None:
        """Remove the damaged files of a unit that this process has claimed, so that they are written again."""
        for name in [name for name in self._damaged if _unit_of(name) == unit]:
            (self.shards / name).unlink(missing_ok=True)
            self._forget(name)

    def _remove(self, units: Collection[str]) -> int:
        for name, shard in self._known.items():
            if shard is not None and shard.unit in units:
                (self.shards / name).unlink(missing_ok=True)
        return len(units)

    def _look(self, name: str) -> None:
        try:
            self._know(name, look_into_shard(self.shards / name, self.columns))
        except FileNotFoundError:  # removed since
            self._forget(name)
        except DamagedError as error:
            if name not in self._known:
                self.say(f"{error}. Its images are computed again")
            self._know(name, None)

    def _know(self, name: str, shard: Shard | None) -> None:
        """Note what is in a file."""
        self._forget(name)
        self._known[name] = shard
        if shard is None:
            self._damaged.add(name)
        else:
            self._by_unit.setdefault(shard.unit, {})[name] = shard

    def _forget(self, name: str) -> None:
        shard = self._known.pop(name, None)
        self._damaged.discard(name)
        if shard is not None:
            del self._by_unit[shard.unit][name]

    def _missing(self, unit: Unit, work: Work) -> list[Work]:
        done: set[tuple[str, str]] = set()
        for shard in self._by_unit.get(unit.name, {}).values():
            if shard.images != unit.keys:
                raise ValueError(
                    f"unit {unit.name}: expected results of its {len(unit.keys)} images in {self.folder}, got those of "
                    f"{len(shard.images)} images that are others, or in another order"
                )
            done |= shard.cells
        todo: dict[tuple[str, ...], list[str]] = {}
        for variant in work.variants:
            measures = tuple(measure for measure in work.measures if (variant, measure) not in done)
            if measures:
                todo.setdefault(measures, []).append(variant)
        return [Work(tuple(variants), measures) for measures, variants in todo.items()]

    def _make(self) -> None:
        if not self._made:
            try:
                self.shards.mkdir(parents=True, exist_ok=True)
                (self.shards / LOCK).touch()
            except OSError as error:
                raise OSError(error.errno, f"cannot write to the folder: {error.strerror}", str(self.folder)) from None
            self._made, file = True, self.shards / RECIPE
            if self._recipe is not None and not file.exists():
                with self._alone(file):
                    if not file.exists():
                        write_durably(file, (json.dumps(self._recipe, indent=2) + "\n").encode("ascii"))
            self._check_recipe()

    @contextmanager
    def _alone(self, file: Path) -> Iterator[None]:
        """Wait until no other process writes ``file``."""
        self._make()
        while True:
            with self._claims(file.name) as held:
                if held:
                    self._remove_hidden(file.parent.glob(f".{file.name}.*.tmp"))
                    yield
                    return
            time.sleep(0.01)

    def _remove_hidden(self, files: Iterable[Path]) -> None:
        """Remove hidden files of this process's claims: only the holder writes them, so these are of dead processes."""
        if self._claims.works:
            for file in files:
                file.unlink(missing_ok=True)

    def _check_recipe(self) -> None:
        """Refuse to mix results of different recipes."""
        file = self.shards / RECIPE
        if self._recipe is None or not file.exists():
            return
        before, recipe = read_json(file), self._recipe
        other = [name for name in {**before, **recipe} if before.get(name) != recipe.get(name)]
        if other:
            name = other[0]
            raise ValueError(
                f"{name}: expected {before.get(name)!r}, as in the results in {self.folder}, got {recipe.get(name)!r} "
                "(other settings need another folder)"
            )


def _unit_of(file_name: str) -> str:
    return file_name.rpartition("-")[0]


def _only(table: Any, cells: set[tuple[str, str]]) -> Any:
    """The rows of ``table`` in ``cells``."""
    import pyarrow as pa

    pairs = zip(table["variant"].to_pylist(), table["measure"].to_pylist(), strict=True)
    kept = [any((variant, name) in cells for name in measures_of(measure)) for variant, measure in pairs]
    return table.filter(pa.array(kept, pa.bool_()))
