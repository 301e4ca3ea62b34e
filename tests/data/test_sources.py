"""Sources: every image exactly once, with the same key from each of them, and bad ones by name."""

import io
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fastfg.data import batches, find_images, from_folder, write_manifest
from fastfg.data.sources import Reader, Rows, Shards, StreamedRows, open_folder, open_manifest, read_samples

N = 11


def to_tensor(image):
    return torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1).float()


READER = Reader(to_tensor)


@pytest.fixture
def folder(tmp_path):
    for i in range(N):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 12), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


def shards(folder, sizes):
    """Tar files with the images of ``folder``, so many in each."""
    paths = iter(find_images([folder]).paths)
    for i, size in enumerate(sizes):
        with tarfile.open(folder.parent / f"s-{i:03d}.tar", "w") as tar:
            for _ in range(size):
                path = next(paths)
                for suffix, data in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                    entry = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return [folder.parent / f"s-{{000..{len(sizes) - 1:03d}}}.tar"]


def hugging_face(folder):
    paths = [str(path) for path in find_images([folder]).paths]
    labels = ["ab".index(path.split("/")[-2]) for path in paths]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def everything(source, workers=0):
    found = {}
    for batch in read_samples(source, batch_size=4, workers=workers):
        assert not batch.errors
        assert len(batch.samples) == len(batch.images)
        for sample, image in zip(batch.samples, batch.images, strict=True):
            assert sample.key not in found
            found[sample.key] = (sample.label, image)
    return found


def test_all_sources_give_the_same(folder, tmp_path):
    expected = everything(open_folder(folder, READER))
    assert len(expected) == N
    assert Counter(label for label, _ in expected.values()) == {"a": 6, "b": 5}
    manifest = write_manifest(from_folder(folder).table, tmp_path / "m.parquet")
    lines = [f"photos/{'ab'[i % 2]}/{i:02d}.png,{'ab'[i % 2]}" for i in range(N)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
    rows = hugging_face(folder)
    sources = (
        open_manifest(manifest, READER),
        open_manifest(tmp_path / "t.csv", READER),
        Shards(shards(folder, (5, 6)), READER),
        Rows(rows, READER),
        StreamedRows(rows.to_iterable_dataset(), READER),
    )
    for source in sources:
        found = everything(source)
        assert found.keys() == expected.keys()
        for key, (label, image) in found.items():
            assert label == expected[key][0]
            assert torch.equal(image, expected[key][1])
    assert isinstance(rows[0]["image"], Image.Image)  # the data set is left as it was
    keys = set(from_folder(folder).table["key"])
    assert keys == set(expected)
    (whole,) = batches(find_images([folder]).paths, to_tensor, N)
    assert sorted(map(str, whole.images.flatten(1).sum(1).tolist())) == sorted(
        str(float(image.sum())) for _, image in expected.values()
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(("sizes", "workers"), [((11,), 3), ((4, 7), 3), ((3, 3, 3, 2), 2), ((0, 11), 2)])
def test_every_sample_exactly_once_with_workers(folder, sizes, workers):
    source = Shards(shards(folder, sizes), READER)
    names = [sample.name for batch in read_samples(source, 2, workers) for sample in batch.samples]
    assert len(names) == len(set(names)) == N


def test_every_sample_exactly_once_across_processes(folder):
    pattern = shards(folder, (11,))
    names = [
        sample.name
        for rank in range(3)
        for batch in read_samples(Shards(pattern, READER, rank=rank, world_size=3), 4)
        for sample in batch.samples
    ]
    assert len(names) == len(set(names)) == N


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("streamed", [False, True])
def test_hugging_face_with_more_workers_than_shards(folder, streamed):
    rows = hugging_face(folder)
    source = StreamedRows(rows.to_iterable_dataset(num_shards=2), READER) if streamed else Rows(rows, READER)
    assert len(everything(source, workers=3)) == N


def test_bad_images_have_names_and_reasons(tmp_path):
    root = tmp_path / "photos" / "a"
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
    image.save(root / "good.png")
    whole = (root / "good.png").read_bytes()
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").write_bytes(b"")
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.convert("L").save(root / "animated.gif", save_all=True, append_images=[Image.new("L", (20, 20))])
    Image.fromarray(rng.integers(0, 60000, (20, 20), dtype=np.uint16)).save(root / "deep.png")
    Image.new("1", (4000, 10)).save(root / "long.png")
    exif = Image.Exif()
    exif[274] = 6
    image.save(root / "turned.png", exif=exif)
    paths = find_images([root]).paths
    (expected,) = batches(paths, to_tensor, 100)
    reasons = {path.name: message for path, message in expected.errors}
    assert set(reasons) == {"truncated.png", "empty.png", "animated.gif", "long.png"}
    entries = [tmp_path / "s.tar"]
    with tarfile.open(entries[0], "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    for source in (open_folder(tmp_path / "photos", READER), Shards(entries, READER)):
        (found,) = read_samples(source, 100)
        got = {sample.name.split("/")[-1]: sample.error for sample in found.errors}
        assert got.keys() == reasons.keys()
        for name, reason in reasons.items():
            assert got[name].split(":")[0] == reason.split(":")[0]
        assert len(found.samples) == len(expected.paths)
        assert sum(sample.window is not None for sample in found.samples) == 1
        total = sorted(float(image.sum()) for image in found.images)
        assert total == sorted(float(image.sum()) for image in expected.images)


def test_what_shards_are_not(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="shards: expected local tar files, got none at .*nothing.tar"):
        Shards([tmp_path / "nothing.tar"], READER)
    for command in ("pipe:touch hacked", "https://example.org/a.tar"):
        with pytest.raises(FileNotFoundError, match="shards: expected local tar files"):
            Shards([command], READER)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        Shards(shards(folder, (11,)), READER, rank=2, world_size=2)
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for name in ("x.png", "x.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    (batch,) = read_samples(Shards([tmp_path / "two.tar"], READER), 4)
    assert batch.errors[0].error == "expected one image in the sample, got ['jpg', 'png']"
    assert batch.images.shape == (0,)


def test_tables_and_columns(folder, tmp_path):
    (tmp_path / "t.csv").write_text("file\na.png")
    with pytest.raises(ValueError, match=r"manifest: expected a column 'path' in .*, got \['file'\]"):
        open_manifest(tmp_path / "t.csv", READER)
    manifest = write_manifest(from_folder(folder).table, tmp_path / "m.parquet")
    sizes = [len(open_manifest(manifest, READER, split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == N
    with pytest.raises(ValueError, match="split: expected one of train, validation, test .*, got 'val'"):
        open_manifest(manifest, READER, "val")
    rows = hugging_face(folder)
    with pytest.raises(ValueError, match=r"image: expected a column of images, got 'label' \(there are: "):
        Rows(rows, READER, image="label")
    with pytest.raises(ValueError, match="label: expected a column, or None, got 'class'"):
        Rows(rows, READER, label="class")
    assert {sample.label for sample in (Rows(rows, READER, label=None)[i] for i in range(N))} == {""}
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        next(read_samples(Rows(rows, READER), 0))
