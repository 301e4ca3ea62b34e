"""One file of a store: a Parquet table and what is in it, written whole or not at all, checked when it is read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastfg.files import write_durably

FORMAT = "fastfg shard 1"
ENTRY = b"fastfg"  # of the file's metadata
CHECKSUM = b"fastfg sha256 "
KEYS = ("key", "variant", "measure")


class Unit(NamedTuple):
    """Images that are computed together, in this order. The same images are in it whichever process computes it.

    ``name`` is part of a file's name, such as ``test-00012``.
    """

    name: str
    keys: tuple[str, ...]


class Work(NamedTuple):
    """Every one of ``variants`` with every one of ``measures``."""

    variants: tuple[str, ...]
    measures: tuple[str, ...]


class Failure(NamedTuple):
    """An image that could not be used, and why."""

    key: str
    path: str
    error: str


@dataclass(frozen=True)
class Shard:
    """What is in a shard: every variant with every measure, for each image of a unit that has not failed."""

    unit: str
    images: tuple[str, ...]
    variants: tuple[str, ...]
    measures: tuple[str, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def file_name(self) -> str:
        """The unit and a hash of the work. The same work has the same name, so it is never in a folder twice."""
        work = json.dumps([self.images, self.variants, self.measures])
        return f"{self.unit}-{hashlib.sha256(work.encode()).hexdigest()[:12]}.parquet"

    @property
    def cells(self) -> set[tuple[str, str]]:
        return {(variant, measure) for variant in self.variants for measure in self.measures}


class DamagedError(ValueError):
    """A file that is not what was written: cut off, or with other bytes."""


def schema(columns: Mapping[str, str]) -> Any:
    """The pyarrow schema of shards with ``columns`` {name: pyarrow's name of its type} after the three keys."""
    import pyarrow as pa

    types = dict.fromkeys(KEYS, "string") | dict(columns)
    return pa.schema([pa.field(name, pa.type_for_alias(kind)) for name, kind in types.items()])


def look_into_shard(file: Path, columns: Mapping[str, str]) -> Shard:
    """What is in the shard ``file``. The checksum is of all its bytes, so its table is not read.

    Raises DamagedError if the file is not what was written, and OSError if it cannot be read at all.
    """
    return _look_into(file, file.read_bytes(), columns)


def read_shard(file: Path, columns: Mapping[str, str]) -> tuple[Shard, Any]:
    """The shard in ``file`` and its pyarrow table. Raises as :func:`look_into_shard` does."""
    import pyarrow.parquet as pq

    content = file.read_bytes()
    shard = _look_into(file, content, columns)
    table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    return shard, table.replace_schema_metadata(None)


def _look_into(file: Path, content: bytes, columns: Mapping[str, str]) -> Shard:
    import pyarrow.parquet as pq

    place = content.rfind(CHECKSUM) + len(CHECKSUM)
    if place < len(CHECKSUM) or content[place : place + 64] != _checksum(content, place):
        raise DamagedError(f"{file}: damaged: its bytes do not match its checksum")
    written = pq.read_schema(io.BytesIO(content))
    found = json.loads(written.metadata[ENTRY])
    failures = tuple(Failure(*failure) for failure in found["failures"])
    images, variants, measures = (tuple(found[name]) for name in ("images", "variants", "measures"))
    shard = Shard(found["unit"], images, variants, measures, failures)
    if found["format"] != FORMAT or file.name != shard.file_name:
        raise DamagedError(f"{file}: damaged: it is {shard.file_name} by its content")
    if written.remove_metadata() != schema(columns):
        raise ValueError(f"{file}: expected the columns {dict(columns)}, got {written.names} (another program's)")
    return shard


def write_shard(folder: Path, shard: Shard, table: Any) -> Path:
    """Write ``table`` to ``folder``, under another name first. The file is on the disk when this returns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {
        "format": FORMAT,
        "unit": shard.unit,
        "images": list(shard.images),
        "variants": list(shard.variants),
        "measures": list(shard.measures),
        "failures": [list(failure) for failure in shard.failures],
    }
    blank = CHECKSUM + b"0" * 64  # inside of the file, so that both are there or neither
    entries = {ENTRY: json.dumps(found).encode("ascii"), b"checksum": blank}
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(entries), buffer, compression="zstd", write_page_checksum=True)
    content = buffer.getvalue().to_pybytes()
    place = content.rfind(CHECKSUM) + len(CHECKSUM)
    file = folder / shard.file_name
    write_durably(file, content[:place] + _checksum(content, place) + content[place + 64 :])
    return file


def measures_of(measure: str) -> list[str]:
    """The measures that a row's ``measure`` can be part of: ``a/b/c`` is part of ``a/b/c``, ``a/b`` and ``a``."""
    parts = measure.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def check_rows(shard: Shard, table: Any) -> None:
    """Raise ValueError that names the first row that is missing, unknown or there twice."""
    failed = {failure.key for failure in shard.failures}
    if not failed <= set(shard.images) or len(failed) < len(shard.failures):
        raise ValueError(
            f"failures: expected images of {shard.unit}, each once, got {sorted(f.key for f in shard.failures)}"
        )
    wanted = {(image, *cell) for image in shard.images if image not in failed for cell in shard.cells}
    rows = list(zip(*(table[name].to_pylist() for name in KEYS), strict=True))
    twice = next((row for n, row in enumerate(rows[1:]) if row == rows[n]), None)  # rows are sorted
    if twice is not None:
        raise ValueError(f"rows: expected each key, variant and measure once, got {twice} twice in {shard.unit}")
    found = set()
    for key, variant, measure in rows:
        cell = next((cell for m in measures_of(measure or "") if (cell := (key, variant, m)) in wanted), None)
        if cell is None:
            raise ValueError(f"rows: expected images and work of {shard.unit}, got {(key, variant, measure)}")
        found.add(cell)
    if wanted - found:
        raise ValueError(f"rows: expected {min(wanted - found)} in {shard.unit}, got none")


def _checksum(content: bytes, place: int) -> bytes:
    """The SHA-256 of a file, as 64 digits, with zeros at ``place``, where these digits are in it.

    Parquet's own checksums leave out its metadata.
    """
    digest = hashlib.sha256(content[:place])
    digest.update(b"0" * 64)
    digest.update(content[place + 64 :])
    return digest.hexdigest().encode("ascii")
