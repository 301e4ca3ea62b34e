"""Images from folders: broken files are named, the rest goes on."""

import pytest
import torch
from PIL import Image

from fastfg.data import batches, find_images
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


def test_find_images(folder):
    names = [path.name for path in find_images([folder])]
    assert names == ["a.png", "b.jpg", "broken.png", "d.png", "empty.png", "c.PNG"]
    assert find_images([folder / "b.jpg"]) == [folder / "b.jpg"]
    with pytest.raises(FileNotFoundError, match="nothing.png, which does not exist"):
        find_images([folder / "nothing.png"])
    (folder / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match="images: expected files named"):
        find_images([folder / "bare"])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_broken_files_are_named_and_the_rest_goes_on(folder, batch_size):
    found = list(batches(find_images([folder]), to_tensor, batch_size))
    assert [path.name for batch in found for path in batch.paths] == ["a.png", "b.jpg", "d.png", "c.PNG"]
    assert [e.path.name for batch in found for e in batch.errors] == ["broken.png", "empty.png"]
    assert all(e.message for batch in found for e in batch.errors)
    assert all(len(batch.images) == len(batch.paths) == batch_size for batch in found[:-1])
    assert found[0].images[0].amax() == 0


def test_only_broken_files(folder):
    (batch,) = batches([folder / "broken.png"], to_tensor, 4)
    assert batch.paths == []
    assert len(batch.errors) == 1


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
