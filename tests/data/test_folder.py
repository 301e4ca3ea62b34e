"""Images from folders: broken files are reported, and the other files are read."""

import errno
import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastfg.data import batches, dicom, find_images, path_text
from fastfg.data.output import claim
from fastfg.study.demo.cells import load_cells
from tests.digits import load_digits
from tests.tools import installed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.PNG", "d.png"]):
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def to_tensor(image):
    return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32).reshape(8, 8, 3).permute(2, 0, 1)


def reasons(found, root):
    return {str(error.path.relative_to(root)): error.message for error in found.skipped}


def test_find_images(folder):
    found = find_images([folder])
    assert [path.name for path in found.paths] == ["a.png", "b.jpg", "broken.png", "d.png", "empty.png", "c.PNG"]
    suffix = "the suffix '.txt' is not that of an image (give the file by itself to have it tried)"
    assert reasons(found, folder) == {"notes.txt": suffix}
    assert find_images([folder / "b.jpg"]) == ([folder / "b.jpg"], [])
    assert find_images([folder / "notes.txt"]) == ([folder / "notes.txt"], [])
    with pytest.raises(FileNotFoundError, match="nothing.png, which does not exist"):
        find_images([folder / "nothing.png"])
    (folder / "bare").mkdir()
    assert find_images([folder / "bare"]) == ([], [])


def test_skipped_files_have_a_reason(folder, monkeypatch):
    monkeypatch.setattr(dicom.importlib.util, "find_spec", lambda name: None)
    (folder / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    for hidden in (".hidden.png", ".cache/a.png", "__MACOSX/a.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"")
    found = find_images([folder])
    assert {path.name for path in found.paths} == {
        "a.png", "b.jpg", "broken.png", "d.png", "empty.png", "c.PNG", "link.png"
    }  # fmt: skip
    skipped = reasons(found, folder)
    assert "DICOM needs pydicom" in skipped.pop("scan.dcm")
    assert "DICOM needs pydicom" in skipped.pop("IM0001")
    assert "the suffix '.txt'" in skipped.pop("notes.txt")
    assert skipped == {
        "dangling.png": "a dangling link",
        "loop.png": f"unreadable file: {os.strerror(errno.ELOOP)}",
        "sub/up": "a link to a folder, which is not followed",
        "pipe.png": "not a regular file",
    }
    (reason,) = find_images([folder / "dangling.png"]).skipped
    assert reason.message == "a dangling link"


def test_unreadable_folders_are_named(folder, monkeypatch):
    whole, denied = os.scandir, str(folder / "sub")

    def scandir(path):
        if str(path) == denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), denied)
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_images([folder])
    assert "c.PNG" not in [path.name for path in found.paths]
    assert reasons(found, folder)["sub"] == "unreadable folder: Permission denied"


def test_earlier_output_is_skipped(folder):
    claim(folder / "out", "attribute", {})
    Image.new("RGB", (8, 8)).save(folder / "out" / "000000-a.png")
    claim(folder / "out", "evaluate", {})  # once more
    found = find_images([folder])
    assert all(path.parent.name != "out" for path in found.paths)
    assert reasons(found, folder)["out"] == "earlier output of fastfg (the folder holds fastfg.json)"
    with pytest.raises(ValueError, match="out: expected a new or empty folder, or one with earlier output of fastfg"):
        claim(folder, "attribute", {})
    assert not (folder / "fastfg.json").exists()
    with pytest.raises(ValueError, match="out: expected a folder, got .*, which is a file"):
        claim(folder / "a.png", "attribute", {})


def test_a_file_is_read_once_and_has_one_text(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ways = [folder / "a.png", Path("a.png"), Path("sub/../a.png"), folder]
    assert [path.name for path in find_images(ways).paths].count("a.png") == 1
    assert len({path_text(path) for path in ways[:3]}) == 1
    assert path_text(Path("a.png")) == str(folder.resolve() / "a.png")
    assert path_text(Path(os.fsdecode(b"/\xff\xc3\xa9.png"))) == "/\\xffé.png"


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_broken_files_are_named_and_the_rest_goes_on(folder, batch_size):
    found = list(batches(find_images([folder]).paths, to_tensor, batch_size))
    assert [path.name for batch in found for path in batch.paths] == ["a.png", "b.jpg", "d.png", "c.PNG"]
    assert [e.path.name for batch in found for e in batch.errors] == ["broken.png", "empty.png"]
    assert all(e.message for batch in found for e in batch.errors)
    assert all(len(batch.images) == len(batch.paths) == batch_size for batch in found[:-1])
    assert found[0].images[0].amax() == 0


def test_only_broken_files(folder):
    (batch,) = batches([folder / "broken.png"], to_tensor, 4)
    assert batch.paths == []
    assert len(batch.errors) == 1


def test_windows_and_limits_reach_the_reader(tmp_path):
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "b.png")
    (batch,) = batches([tmp_path / "a.png", tmp_path / "b.png"], to_tensor, 4, window=(0.0, 600.0))
    assert batch.windows == [(0.0, 600.0), None]
    assert batch.images.amax((1, 2, 3)).tolist() == [128, 9]
    (batch,) = batches([tmp_path / "a.png"], to_tensor, 4, max_pixels=63)
    assert "expected at most 63 pixels" in batch.errors[0].message
    for wrong in ({"max_pixels": 0}, {"max_aspect": 0.5}, {"window": (2.0, 1.0)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            next(batches([tmp_path / "a.png"], to_tensor, **({"batch_size": 4} | wrong)))


def test_the_digits():
    pixels, labels = installed(load_digits)
    assert pixels.shape == (5000, 1, 28, 28)
    assert labels.bincount().tolist() == [500] * 10
    assert pixels.amin() == 0
    assert pixels.amax() == 1


def test_the_cells():
    cells = installed(load_cells)
    assert len(cells.paths) == len(cells.probability) == 2624
    assert set(cells.kind) == {"mono", "poly"}
    assert min(cells.probability) == 0
    assert max(cells.probability) == 1
    assert Image.open(cells.paths[0]).size == (300, 300)


@pytest.mark.parametrize("readers", [2, 5])
def test_batches_are_the_same_for_any_number_of_readers(folder, readers):
    paths = find_images([folder]).paths * 3
    alone = list(batches(paths, to_tensor, 3))
    found = list(batches(paths, to_tensor, 3, readers=readers))
    assert [(b.paths, b.errors, b.windows) for b in found] == [(b.paths, b.errors, b.windows) for b in alone]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, alone, strict=True))
    with pytest.raises(ValueError, match="^readers: expected at least 1, got 0"):
        next(batches(paths, to_tensor, 3, readers=0))


def test_readers_are_a_batch_ahead_and_no_further(folder):
    paths, begun = [folder / "a.png"] * 40, []

    def transform(image):
        begun.append(threading.current_thread())
        return to_tensor(image)

    found = batches(paths, transform, 4, readers=2)
    next(found)
    assert len(begun) <= 4 + 4 + 2
    assert threading.main_thread() not in begun
    found.close()  # whoever stops early waits only for what is being read
    n = len(begun)
    time.sleep(0.05)
    assert len(begun) == n < 40


def test_readers_leave_the_filters_of_warnings(folder):
    before = list(warnings.filters)
    list(batches([folder / "a.png"] * 200, to_tensor, 8, readers=8))
    assert warnings.filters == before
