"""The manifest: what it refuses, what stays together, and that no image is in two splits."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fastfg.data.layouts.elpv import elpv
from fastfg.data.manifest import (
    COLUMNS,
    build,
    class_counts,
    content_hash,
    draw,
    key_of,
    read_manifest,
    verify_content,
    with_own_groups,
    write_manifest,
)
from fastfg.data.splits import from_folder, split
from tests.tools import installed


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    """20 images in two classes, ``dark`` and ``light``."""
    for i in range(20):
        picture(tmp_path / "photos" / ("dark" if i < 10 else "light") / f"p{i // 4}-{i}.png", 12 * i)
    return tmp_path / "photos"


@pytest.fixture
def table(classes):
    return from_folder(classes).table


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_what_is_written_is_read(table, tmp_path, suffix):
    file = write_manifest(table, tmp_path / f"manifest.{suffix}")
    pd.testing.assert_frame_equal(read_manifest(file), table)
    raw = pd.read_csv(file) if suffix == "csv" else pd.read_parquet(file)
    assert list(raw.columns) == list(COLUMNS)
    assert sorted(raw["path"])[0] == "photos/dark/p0-0.png"  # the folder can be moved
    verify_content(read_manifest(file))


def test_the_folder_can_be_moved(table, tmp_path):
    write_manifest(table, tmp_path / "photos" / "manifest.parquet")
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    read = read_manifest(tmp_path / "elsewhere" / "manifest.parquet")
    assert all(path.startswith(str(tmp_path / "elsewhere")) for path in read["path"])
    assert list(read["key"]) == list(table["key"])


def test_the_same_folder_gives_the_same_bytes(classes, tmp_path):
    files = [write_manifest(from_folder(classes).table, tmp_path / f"{i}.parquet") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_key_is_the_start_of_the_hash(table):
    row = table.iloc[0]
    assert row["sha256"] == content_hash(Path(row["path"]))
    assert row["key"] == key_of(row["sha256"]) == row["sha256"][:16]
    assert list(table["key"]) == sorted(table["key"])


def test_labels_of_a_csv_stay_text(tmp_path):
    rows = [
        {"path": picture(tmp_path / f"{i}.png", i), "label": label, "split": "train", "group": "01"}
        for i, label in enumerate(["NA", "01", "1.0"])
    ]
    file = write_manifest(build(rows).table, tmp_path / "m.csv")
    read = read_manifest(file)
    assert sorted(read["label"]) == ["01", "1.0", "NA"]
    assert set(read["group"]) == {"01"}


BAD = {
    "columns": (
        lambda t: t.drop(columns=["sha256", "group"]),
        r"expected the columns key, .*none for \['group', 'sha256'\]",
    ),
    "no image": (lambda t: t[:0], "at least one image in .*got none"),
    "split": (lambda t: t.assign(split="val"), r"split: expected train, validation, test in .*, got \['val'\]"),
    "label": (lambda t: t.assign(label=""), "label: expected a value in each row"),
    "number": (lambda t: t.assign(label=1), "label: expected text in .*, got 1"),
    "hash": (lambda t: t.assign(sha256="ab"), "sha256: expected 64 hex digits in .*, got 'ab'"),
    "key": (lambda t: t.assign(key="ab"), "key: expected the first 16 digits of sha256, .*, got 'ab'"),
    "twice": (
        lambda t: pd.concat([t, t[:1].assign(split="test"), t[:1].assign(split="train")]),
        "key: expected each image once in .*twice \\(in .*train",
    ),
    "path": (lambda t: t.assign(path=t["path"].iloc[0]), "path: expected each image once"),
    "group": (
        lambda t: t.assign(group="p"),
        "each group in one split .*'p' in train and validation and test",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_manifest_is_refused(name, table, tmp_path):
    change, message = BAD[name]
    broken = change(table)
    with pytest.raises(ValueError, match=message):
        write_manifest(broken, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()
    broken.to_parquet(tmp_path / "n.parquet", index=False)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "n.parquet")


def test_missing_and_damaged_files_are_named(table, tmp_path):
    file = write_manifest(table, tmp_path / "m.parquet")
    Path(table["path"].iloc[3]).unlink()
    with pytest.raises(FileNotFoundError, match=f"got none at {table['path'].iloc[3]}"):
        read_manifest(file)
    assert len(read_manifest(file, check_files=False)) == 20
    with pytest.raises(FileNotFoundError, match="manifest: expected a file, got .*nothing.csv, which is none"):
        read_manifest(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match="manifest: expected a .csv or .parquet file, got .*m.pkl"):
        read_manifest(tmp_path / "m.pkl")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="manifest: expected a table in .*m.parquet, got Arrow"):
        read_manifest(file)


def test_changed_content_is_noticed(table, tmp_path):
    file = write_manifest(table, tmp_path / "m.parquet")
    picture(tmp_path / "photos/dark/p0-0.png", 255)
    with pytest.raises(ValueError, match="sha256: .*got another in .*p0-0.png"):
        verify_content(read_manifest(file))


def test_a_file_that_was_there_stays_if_writing_fails(table, tmp_path):
    file = write_manifest(table, tmp_path / "m.parquet")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="label"):
        write_manifest(table.assign(label=""), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_identical_files_are_one_image_and_in_the_test_split(tmp_path):
    first, second, third = (picture(tmp_path / name, 7) for name in ("a.png", "b.png", "c.png"))
    other = picture(tmp_path / "d.png", 8)
    rows = [
        {"path": first, "label": "x", "split": "train"},
        {"path": second, "label": "x", "split": "test"},
        {"path": third, "label": "x", "split": "validation"},
        {"path": other, "label": "x", "split": "train"},
    ]
    made = build(rows)
    assert dict(zip(made.table["path"], made.table["split"], strict=True)) == {str(second): "test", str(other): "train"}
    assert made.dropped["path"].tolist() == [str(first), str(third)]
    assert set(made.dropped["reason"]) == {f"the same content as {second} (test)"}


def test_identical_files_with_different_labels_are_all_dropped(tmp_path):
    rows = [
        {"path": picture(tmp_path / f"{i}.png", 7 * (i > 1)), "label": "xyy"[i], "split": "train"} for i in range(3)
    ]
    made = build(rows)
    assert made.table["label"].tolist() == ["y"]
    assert set(made.dropped["reason"]) == {"the same content with different labels: 'x', 'y'"}


def test_split_keeps_groups_together_and_is_the_same_for_any_order(classes):
    made = from_folder(classes, group=lambda path: path.stem.split("-")[0], seed=3)
    assert made.table.groupby("group")["split"].nunique().max() == 1
    assert set(made.table["split"]) == {"train", "validation", "test"}
    shuffled = made.table.sample(frac=1, random_state=0)
    again = split(shuffled, seed=3)
    assert dict(zip(again["key"], again["split"], strict=True)) == dict(
        zip(made.table["key"], made.table["split"], strict=True)
    )
    assert not split(made.table, seed=4).equals(made.table)


def test_split_has_the_shares(table):
    counts = split(table, validation=0.2, test=0.1)["split"].value_counts()
    assert counts.to_dict() == {"train": 14, "validation": 4, "test": 2}
    assert set(split(table, validation=0.0, test=0.5)["split"]) == {"train", "test"}
    assert class_counts(table).sum().to_dict() == {"train": 14, "validation": 3, "test": 3}
    assert class_counts(table).sum(axis=1).to_dict() == {"dark": 10, "light": 10}


def test_shares_out_of_range_and_too_few_groups(table):
    with pytest.raises(ValueError, match="test: expected a share of at least 0 and below 1, got -0.1"):
        split(table, test=-0.1)
    with pytest.raises(ValueError, match="leave images for training, got 0.5 and 0.5"):
        split(table, validation=0.5, test=0.5)
    with pytest.raises(ValueError, match="got none for train and validation \\(1 groups with 20 images\\)"):
        split(table.assign(group="one"))


def test_a_group_named_as_a_key_is_not_that_image(table):
    table = table.assign(group=["", table["key"].iloc[0], *[""] * 18])
    for seed in range(20):
        made = split(table, seed=seed)
        if made["split"].iloc[0] != made["split"].iloc[1]:
            return
    raise AssertionError("the two are always together")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing")])
def test_folders_of_splits_are_kept(tmp_path, names):
    for i, name in enumerate(names):
        for j, label in enumerate(("a", "b")):
            picture(tmp_path / name / label / "deeper" / "x.png", 10 * i + j)
    made = from_folder(tmp_path)
    assert class_counts(made.table).to_numpy().tolist() == [[1, 1, 1], [1, 1, 1]]


def test_what_is_no_folder_of_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: expected a folder, got"):
        from_folder(tmp_path / "nothing")
    picture(tmp_path / "stray.png", 1)
    with pytest.raises(ValueError, match="folder: expected a folder per class with images in .*, got none"):
        from_folder(tmp_path)
    picture(tmp_path / "train" / "a" / "x.png", 2)
    picture(tmp_path / "cats" / "y.png", 3)
    with pytest.raises(ValueError, match="folders of splits or of classes in .*, got train with cats"):
        from_folder(tmp_path)


def test_skipped_files_have_reasons(classes):
    (classes / "notes.txt").write_text("x")
    picture(classes / "stray.png", 250)
    reasons = from_folder(classes).dropped.set_index("path")["reason"]
    assert reasons[str(classes / "stray.png")] == "not in the folder of a class"
    assert "'.txt' is not that of an image" in reasons[str(classes / "notes.txt")]


def test_a_group_is_asked_for_each_image(classes):
    with pytest.raises(ValueError, match="group: expected a name for each image, got None for .*p0-0.png"):
        from_folder(classes, group={})


@pytest.mark.parametrize("named", ["image b", "image c", "single image b", "image b'"])
def test_the_group_of_an_image_without_one_is_no_other_group(named):
    groups = with_own_groups({"a": named, "b": "", "c": "", "d": "image b", "single image b": ""})
    assert (groups["a"], groups["d"]) == (named, "image b")
    assert len(set(groups.values())) == 5 - (named == "image b")


def test_draw(table):
    fewer = draw(table, "train", 5, seed=1)
    assert class_counts(fewer).sum().to_dict() == {"train": 5, "validation": 3, "test": 3}
    assert draw(table.sample(frac=1, random_state=0), "train", 5, seed=1)["key"].isin(fewer["key"]).all()
    assert set(draw(table, "train", 4, seed=1)["key"]) < set(fewer["key"])  # a larger draw holds the smaller one
    assert draw(table, "train", None) is table
    with pytest.raises(ValueError, match="test: expected 0 to 3 images, as the split has, got 4"):
        draw(table, "test", 4)


def test_elpv():
    table, dropped = installed(elpv)
    assert len(dropped) == 0
    assert table["split"].value_counts().to_dict() == {"train": 1674, "test": 590, "validation": 360}
    assert sorted(table.loc[table["split"] == "test", "group"].unique()) == ["run-01", "run-06"]
    assert sorted(table.loc[table["split"] == "validation", "group"].unique()) == ["run-03", "run-08"]
    assert (table["label"] == "defective").sum() == 715 + 106
    drawn = elpv(validation=100, test=300).table
    assert drawn["split"].value_counts().to_dict() == {"train": 1674, "test": 300, "validation": 100}


def test_elpv_parts_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no labels.csv \\(https://github.com/zae-bayern/elpv-dataset"):
        elpv(tmp_path)
    (tmp_path / "labels.csv").write_text("images/cell0001.png  1.0  mono\n")
    with pytest.raises(FileNotFoundError, match="none for 1, such as .*cell0001.png"):
        elpv(tmp_path)
    picture(tmp_path / "images" / "cell0001.png", 1)
    with pytest.raises(ValueError, match="elpv: expected 10 runs of mono and poly in .*, got 1"):
        elpv(tmp_path)
    (tmp_path / "labels.csv").write_text("images/cell0001.png\n")
    with pytest.raises(ValueError, match="elpv: expected a file, a probability, and mono or poly"):
        elpv(tmp_path)
