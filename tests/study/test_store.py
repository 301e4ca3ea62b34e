"""The store: results of many processes in one folder, whole whenever a process stops."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fastfg.files import temporary
from fastfg.study import claims
from fastfg.study.shards import Failure, Unit, Work
from fastfg.study.store import Store
from fastfg.study.units import run_units

FORK = multiprocessing.get_context("fork")
UNITS = [Unit(f"test-{n:05d}", tuple(f"image-{n}-{i}" for i in range(3))) for n in range(12)]
WORK = Work(("vanilla", "gated"), ("saco", "srg"))
KEYS = sorted(key for unit in UNITS for key in unit.keys)


def rows_of(unit, work):
    """Scores that depend on all that they are of."""
    return [
        {"key": k, "variant": v, "measure": m, "target": len(k), "score": random.Random(k + v + m).random()}
        for k in unit.keys
        for v in work.variants
        for m in work.measures
    ]


class Do:
    """Counts the work that it is asked for."""

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def __call__(self, unit, work):
        self.calls.append((unit, work))
        good = unit._replace(keys=tuple(key for key in unit.keys if key not in self.failing))
        failures = [Failure(key, f"/photos/{key}.png", "cut off") for key in unit.keys if key in self.failing]
        return rows_of(good, work), failures


def stop(unit, work):
    raise KeyboardInterrupt


@pytest.fixture
def alone(tmp_path_factory):
    """The table that one process makes in one go."""
    store = Store(tmp_path_factory.mktemp("alone"))
    run_units(store, UNITS, WORK, Do())
    return store.read()


def test_one_process(tmp_path):
    store, do, told = Store(tmp_path / "new"), Do(), []
    run_units(store, UNITS[:2], WORK, do, progress=told.append)
    assert do.calls == [(unit, WORK) for unit in UNITS[:2]]
    assert [(p.done, p.total, p.failed) for p in told] == [(0, 6, 0), (3, 6, 0), (6, 6, 0)]
    table = store.read().to_pylist()
    assert [(row["key"], row["variant"], row["measure"]) for row in table] == [
        (f"image-{n}-{i}", variant, measure)
        for n in (0, 1)
        for i in (0, 1, 2)
        for variant in ("gated", "vanilla")
        for measure in ("saco", "srg")
    ]
    assert table[0]["score"] == random.Random("image-0-0gatedsaco").random()
    assert not (tmp_path / "new" / "errors.parquet").exists()
    run_units(Store(tmp_path / "new"), UNITS[:2], WORK, stop)  # all is there


def test_only_what_is_missing_is_done(tmp_path):
    do = Do()
    run_units(Store(tmp_path), UNITS[:2], WORK, do)
    more = Work(("vanilla", "gated", "random"), ("saco", "srg", "road"))
    run_units(Store(tmp_path), UNITS[:3], more, do)
    old, new = Work(("vanilla", "gated"), ("road",)), Work(("random",), ("saco", "srg", "road"))
    assert do.calls[2:] == [(UNITS[0], old), (UNITS[0], new), (UNITS[1], old), (UNITS[1], new), (UNITS[2], more)]
    whole = Store(tmp_path / "whole")
    run_units(whole, UNITS[:3], more, Do())
    assert Store(tmp_path).read().equals(whole.read())
    some = Store(tmp_path).read(units=["test-00001"], variants=["random"], measures=["road"]).to_pylist()
    assert [(row["key"], row["variant"], row["measure"]) for row in some] == [
        (f"image-1-{i}", "random", "road") for i in range(3)
    ]


def test_a_measure_with_several_rows(tmp_path):
    def do(unit, work):
        rows = [row | {"measure": f"curve/{n}"} for row in rows_of(unit, work) for n in range(4)]
        return rows, []

    store = Store(tmp_path)
    run_units(store, UNITS[:1], Work(("vanilla",), ("curve",)), do)
    assert store.read(measures=["curve"]).num_rows == 12
    assert store.missing(UNITS[0], ["vanilla"], ["curve"]) == []


def test_interrupted_work_goes_on(tmp_path, alone):
    do = Do()

    def until_the_third(unit, work):
        if len(do.calls) == 2:
            raise KeyboardInterrupt
        return do(unit, work)

    with pytest.raises(KeyboardInterrupt):
        run_units(Store(tmp_path), UNITS, WORK, until_the_third)
    assert Store(tmp_path).progress(UNITS, WORK) == (6, 36, 0)
    run_units(Store(tmp_path), UNITS, WORK, do)
    assert len(do.calls) == len(UNITS)
    assert Store(tmp_path).read().equals(alone)


def test_claims_in_one_process_and_between_processes(tmp_path):
    one, other = Store(tmp_path), Store(tmp_path)

    def elsewhere():
        def claim():
            with one.claim("test-00000") as held:
                sys.exit(held)

        process = FORK.Process(target=claim)
        process.start()
        return ended(process)

    with one.claim("test-00000") as first, other.claim("test-00001") as second, other.claim("test-00000") as third:
        assert (first, second, third) == (True, True, False)
        assert elsewhere() == 0
        with other.claim("test-00002"):
            pass  # giving one back must not drop the others
        assert elsewhere() == 0
    assert elsewhere() == 1


def start(folder, seconds):
    """A process that takes ``seconds`` per unit."""

    def do(unit, work):
        time.sleep(seconds)
        with (folder.parent / "counts").open("a") as file:
            file.write(unit.name + "\n")
        return Do()(unit, work)

    process = FORK.Process(target=lambda: run_units(Store(folder), UNITS, WORK, do, wait=0.02))
    process.start()
    return process


def ended(process):
    process.join(60)
    return process.exitcode


def test_two_processes_share_the_work(tmp_path, alone):
    workers = [start(tmp_path / "both", 0.05) for _ in range(2)]
    assert [ended(worker) for worker in workers] == [0, 0]
    assert sorted((tmp_path / "counts").read_text().split()) == [unit.name for unit in UNITS]  # none twice
    assert Store(tmp_path / "both").read().equals(alone)


def test_work_of_a_killed_process_is_taken_over(tmp_path, alone):
    killed = start(tmp_path / "both", 60)
    store, whole = Store(tmp_path / "both"), (36, 36, 0)
    while not store.shards.exists():
        time.sleep(0.02)
    time.sleep(0.3)
    other = start(tmp_path / "both", 0)
    while store.progress(UNITS, WORK).done < 33:
        time.sleep(0.02)
    time.sleep(0.3)
    assert other.is_alive()  # waits for the unit that the first one holds
    assert store.progress(UNITS, WORK).done == 33
    killed.kill()
    assert (ended(killed), ended(other)) == (-signal.SIGKILL, 0)
    assert store.progress(UNITS, WORK) == whole
    assert Store(tmp_path / "both").read().equals(alone)


def test_kills_at_random_moments(tmp_path, alone):
    """Four processes, ten kills; a process that was killed is started again. The files are as after one process."""
    rng, folder = random.Random(0), tmp_path / "four"
    workers, kills = [start(folder, 0.2) for _ in range(4)], 0
    with Store(folder).claim(UNITS[-1].name):  # so that the work can't end before the kills, however slow they are
        while kills < 10:
            time.sleep(rng.uniform(0, 0.06))
            n = rng.randrange(4)
            if workers[n].is_alive():
                workers[n].kill()
                workers[n].join()
                workers[n], kills = start(folder, 0.2), kills + 1
    assert [ended(worker) for worker in workers] == [0] * 4
    assert kills == 10
    store = Store(folder)
    assert store.read().equals(alone)
    assert sorted(set(store.read()["key"].to_pylist())) == KEYS
    assert [file.name for file in store.shards.glob(".*.tmp")] == []


def test_the_same_work_is_the_same_file(tmp_path):
    files = []
    for name in "ab":
        store = Store(tmp_path / name)
        files.append(store.write(UNITS[0], WORK, rows_of(UNITS[0], WORK)[:: 1 if name == "a" else -1]))
    assert files[0].name == files[1].name
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_shard_is_named_and_done_again(tmp_path, alone, damage):
    run_units(Store(tmp_path), UNITS, WORK, Do())
    file = next((tmp_path / "shards").glob("test-00004-*.parquet"))
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 4
    file.write_bytes({"truncated": content[:-100], "empty": b"", "flipped": content}[damage])
    said, do = [], Do()
    with pytest.raises(ValueError, match=f"{file.name}: damaged"):
        Store(tmp_path, say=said.append).read()
    assert said[0].startswith(f"{file}: damaged: ")
    run_units(Store(tmp_path, say=said.append), UNITS, WORK, do)
    assert do.calls == [(UNITS[4], WORK)]
    assert len(said) == 2
    assert Store(tmp_path).read().equals(alone)


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    """Parquet's own checksums leave out its metadata."""
    store = Store(tmp_path)
    file = store.write(UNITS[0], WORK, rows_of(UNITS[0], WORK))
    content = file.read_bytes()
    for place in range(0, len(content), 5):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            Store(tmp_path, say=lambda text: None).read()


def test_a_full_disk(tmp_path, monkeypatch, alone):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write test-00002.*No space left on device. What was finished before"):
        run_units(Store(tmp_path), UNITS, WORK, Do())
    assert list((tmp_path / "shards").glob(".*.tmp")) == []
    assert Store(tmp_path).progress(UNITS, WORK).done == 6
    run_units(Store(tmp_path), UNITS, WORK, Do())
    assert Store(tmp_path).read().equals(alone)


def test_a_read_only_folder_can_be_read(tmp_path, monkeypatch):
    run_units(Store(tmp_path), UNITS, WORK, Do())

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "touch", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    store = Store(tmp_path)
    assert store.read().num_rows == 144
    assert store.progress(UNITS, WORK).done == 36
    with pytest.raises(OSError, match="cannot write to the folder: Read-only file system"):
        run_units(store, UNITS, Work(("other",), ("saco",)), Do())


def test_what_dead_processes_left_is_removed(tmp_path):
    store = Store(tmp_path)
    file = store.write(UNITS[0], WORK, rows_of(UNITS[0], WORK))
    left = [temporary(file), temporary(file.with_name(file.name.replace("00000", "00007")))]
    for one in left:
        one.write_bytes(b"half")
    with Store(tmp_path).claim("test-00007"):  # a living process writes this one
        store.remove_leftovers()
        assert [one.exists() for one in left] == [False, True]
    store.remove_leftovers()
    assert [one.exists() for one in left] == [False, False]


def test_the_folder_is_not_listed_for_each_unit(tmp_path, monkeypatch):
    units, listed = [Unit(f"test-{n:05d}", (f"image-{n}",)) for n in range(60)], []
    scandir = os.scandir
    monkeypatch.setattr("fastfg.study.store.os.scandir", lambda path: listed.append(path) or scandir(path))
    run_units(Store(tmp_path), units, WORK, Do())
    run_units(Store(tmp_path), units, WORK, stop)
    assert len(listed) < 30


def test_what_another_process_has_just_done_is_not_done_again(tmp_path):
    do, done = Do(), []

    def slowly(unit, work):
        if not done:  # before this process looks at the folder again, another one does the third unit
            other = Store(tmp_path)
            other.write(UNITS[2], WORK, rows_of(UNITS[2], WORK))
        done.append(unit)
        return do(unit, work)

    run_units(Store(tmp_path), UNITS[:3], WORK, slowly)
    assert done == UNITS[:2]


def test_the_hidden_file_of_a_living_process_is_left(tmp_path):
    store = Store(tmp_path)
    with store.claim("test-00003"):
        hidden = temporary(store.shards / "test-00003-0123456789ab.parquet")
        hidden.write_bytes(b"half")
        Store(tmp_path).remove_leftovers()
        assert hidden.exists()


def test_without_locks(tmp_path, monkeypatch, alone):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "lockf", refuse)
    said, do = [], Do()
    run_units(Store(tmp_path, say=said.append), UNITS, WORK, do)
    assert len(do.calls) == len(UNITS)
    assert said == [
        f"{tmp_path / 'shards' / '.lock'}: this file system has no locks (No locks available). Processes that work on "
        "this folder at the same time may do the same work twice. On a CPU, this changes no result"
    ]
    twice = Store(tmp_path, say=said.append)
    twice.write(UNITS[3], Work(("gated",), ("srg",)), rows_of(UNITS[3], Work(("gated",), ("srg",))))
    assert twice.read().equals(alone)  # work that two processes did is there once


def test_images_that_fail(tmp_path):
    failing = ("image-0-1", "image-2-0", "image-2-1", "image-2-2")
    do = Do(failing)
    store = Store(tmp_path)
    run_units(store, UNITS[:3], WORK, do)
    assert store.progress(UNITS[:3], WORK) == (9, 9, 4)
    listed = shards_errors(tmp_path)
    assert listed["key"] == list(failing)
    assert (listed["path"][0], listed["error"][0]) == ("/photos/image-0-1.png", "cut off")
    assert store.read().num_rows == 5 * 4
    more = Work(("vanilla",), ("road",))
    run_units(Store(tmp_path), UNITS[:3], more, do)  # tried once, and not again
    assert [(unit.keys, work) for unit, work in do.calls[3:]] == [
        (("image-0-0", "image-0-2"), more),
        (UNITS[1].keys, more),
    ]
    assert store.forget_failures() == 2
    run_units(Store(tmp_path), UNITS[:3], WORK, Do())
    assert store.read(measures=["saco", "srg"]).num_rows == 36
    assert not (tmp_path / "errors.parquet").exists()


def test_images_that_failed_before_are_listed_by_their_split(tmp_path):
    splits = {key: "test" for unit in UNITS for key in unit.keys} | {"image-1": "train"}
    store = Store(tmp_path, failed=[Failure("image-1", "/photos/1.png", "cut off")], splits=splits)
    run_units(store, UNITS[:3], WORK, Do(("image-2-0",)))
    assert store.progress(UNITS[:3], WORK).failed == 1
    for table in (store.failures(), pq.read_table(tmp_path / "errors.parquet")):
        assert table.column_names == ["path", "key", "error", "split"]
        assert table.select(["key", "split"]).to_pylist() == [
            {"key": "image-1", "split": "train"},
            {"key": "image-2-0", "split": "test"},
        ]


def shards_errors(folder):
    table = pq.read_table(folder / "errors.parquet")
    assert table.column_names == ["path", "key", "error"]
    return table.to_pydict()


def test_too_many_failures(tmp_path):
    failing = ("image-0-1", "image-1-0", "image-5-0")
    run_units(Store(tmp_path / "three"), UNITS, WORK, Do(failing), max_failures=3 / 36)
    do = Do(failing)
    message = r"max_failures: expected at most 0.05 of 36 images to fail, got 2; the first in .*errors.parquet: "
    with pytest.raises(ValueError, match=message + "/photos/image-0-1.png: cut off"):
        run_units(Store(tmp_path), UNITS, WORK, do, max_failures=0.05)
    assert len(do.calls) == 2
    assert shards_errors(tmp_path)["key"] == ["image-0-1", "image-1-0"]
    with pytest.raises(ValueError, match="got 2"):
        run_units(Store(tmp_path), UNITS, WORK, stop, max_failures=0.05)


def test_another_recipe_is_refused(tmp_path):
    recipe = {"weights": "ab12", "seed": 0}
    first, late = Store(tmp_path, recipe=recipe), Store(tmp_path, recipe=recipe | {"weights": "cd34"})
    assert list(tmp_path.iterdir()) == []
    run_units(first, UNITS[:1], WORK, Do())
    Store(tmp_path, recipe=recipe)
    with pytest.raises(ValueError, match=r"seed: expected 0, as in the results in .*, got 1 \(other settings need"):
        Store(tmp_path, recipe=recipe | {"seed": 1})
    with pytest.raises(ValueError, match="weights: expected 'ab12'"):
        run_units(late, UNITS, WORK, Do())


def test_several_results_in_one_folder(tmp_path):
    run_units(Store(tmp_path, "maps", recipe={"a": 1}), UNITS[:2], WORK, Do())
    other = Store(tmp_path, "scores", recipe={"a": 2})
    run_units(other, UNITS[:3], WORK, Do())
    assert other.forget_others(UNITS[1:2]) == 2
    assert set(other.read()["key"].to_pylist()) == set(UNITS[1].keys)
    assert Store(tmp_path, "maps").read().num_rows == 24


def test_other_images_are_refused(tmp_path):
    run_units(Store(tmp_path), UNITS[:1], WORK, Do())
    other = [Unit("test-00000", ("image-0-0", "image-0-1"))]
    with pytest.raises(ValueError, match="unit test-00000: expected results of its 2 images .*, got those of 3 images"):
        run_units(Store(tmp_path), other, WORK, Do())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], r"rows: expected \('image-0-0', 'vanilla', 'saco'\) in test-00000, got none"),
        (lambda rows: [*rows, rows[0]], r"rows: expected each key, variant and measure once, got .* twice"),
        (lambda rows: [*rows, rows[0] | {"key": "x"}], r"rows: expected images and work of test-00000, got \('x'"),
        (lambda rows: [*rows, rows[0] | {"measure": "road"}], "rows: expected images and work .*'road'"),
    ],
)
def test_rows_are_checked(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Store(tmp_path).write(UNITS[0], WORK, change(rows_of(UNITS[0], WORK)))
    with pytest.raises(ValueError, match="failures: expected images of test-00000"):
        Store(tmp_path).write(UNITS[0], WORK, [], [Failure("x", "", "")])


@pytest.mark.parametrize(
    ("units", "work", "share", "message"),
    [
        ([], WORK, 1, "units: expected at least one"),
        ([Unit("../x", ("a",))], WORK, 1, "units: expected names of letters"),
        ([Unit("x", ("a",)), Unit("y", ("a",))], WORK, 1, "units: expected each image in one unit and once, got 'a'"),
        (UNITS, Work((), ("saco",)), 1, "work: expected variants"),
        (UNITS, WORK, 2, "max_failures: expected 0 to 1, got 2"),
    ],
)
def test_arguments(tmp_path, units, work, share, message):
    with pytest.raises(ValueError, match=message):
        run_units(Store(tmp_path), units, work, Do(), max_failures=share)
