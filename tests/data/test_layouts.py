"""The published layouts, as small trees of real photographs."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastfg.data import class_counts, read_mask, split
from fastfg.data.layouts import covid_qu_ex, hyperkvasir, imagenet
from fastfg.data.splits import not_trained_on
from fastfg.study.demo.cells import load_cells
from tests.tools import installed


@pytest.fixture(scope="module")
def photographs():
    return installed(load_cells).paths


def put(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix.lower() == source.suffix.lower():
        shutil.copyfile(source, target)
    else:
        Image.open(source).save(target, "JPEG")
    return target


def mask(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((300, 300), np.uint8)
    pixels[:150] = 255
    Image.fromarray(pixels).save(target)


@pytest.fixture
def covid(tmp_path, photographs):
    """Both parts, two images per class and split, named as in the archive."""
    names = {"COVID-19": "covid_{}.png", "Non-COVID": "non_COVID ({}).png", "Normal": "Normal ({}).png"}
    files = iter(photographs)
    for part, kinds in (("Lung", ("lung masks",)), ("Infection", ("lung masks", "infection masks"))):
        root = tmp_path / "archive" / f"{part} Segmentation Data" / f"{part} Segmentation Data"
        for folder in ("Train", "Val", "Test"):
            for label, name in names.items():
                for i in range(2):
                    put(next(files), root / folder / label / "images" / name.format(i))
                    for kind in kinds:
                        mask(root / folder / label / kind / name.format(i))
    return tmp_path / "archive"


def test_covid_qu_ex(covid):
    table, dropped = covid_qu_ex.prepare(covid)
    assert len(dropped) == 0
    assert class_counts(table).to_numpy().tolist() == [[2, 2, 2]] * 3
    assert sorted(set(table["label"])) == ["COVID-19", "Non-COVID", "Normal"]
    row = table[table["path"].str.endswith("Val/Non-COVID/images/non_COVID (1).png")].iloc[0]
    assert row["mask"].endswith("Val/Non-COVID/lung masks/non_COVID (1).png")
    assert (row["split"], row["group"]) == ("validation", "")
    inner = covid / "Infection Segmentation Data" / "Infection Segmentation Data"
    for source in (covid, covid / "Infection Segmentation Data", inner):
        table, _ = covid_qu_ex.prepare(source, part="infection")
        assert table["mask"].str.contains("/infection masks/").all()
    assert covid_qu_ex.prepare(covid, part="infection", mask="lung masks").table["mask"].str.contains("lung").all()


def test_covid_qu_ex_names_what_is_missing_and_what_is_unexpected(covid):
    root = covid / "Lung Segmentation Data" / "Lung Segmentation Data"
    (root / "Train/Normal/images/notes.txt").write_text("x")
    (root / "Train/Pneumonia").mkdir()
    (root / "Test/COVID-19/lung masks/covid_0.png").rename(root / "Test/COVID-19/lung masks/covid_7.png")
    table, dropped = covid_qu_ex.prepare(covid)
    reasons = {path.removeprefix(f"{root}/"): reason for path, reason in dropped.itertuples(index=False)}
    assert reasons["Train/Pneumonia"] == "not part of the published layout"
    assert reasons["Test/COVID-19/lung masks/covid_7.png"] == "a mask without an image"
    assert "not that of an image" in reasons["Train/Normal/images/notes.txt"]
    assert len(table) == 18
    assert (table["mask"] == "").sum() == 1
    shutil.rmtree(root / "Val/Normal")
    with pytest.raises(FileNotFoundError, match=r"none: Val/Normal/images, Val/Normal/lung masks \(published on"):
        covid_qu_ex.prepare(covid)
    with pytest.raises(FileNotFoundError, match="none: Train/COVID-19/infection masks, .* and 6 more"):
        covid_qu_ex.prepare(covid / "Lung Segmentation Data", part="infection")
    with pytest.raises(FileNotFoundError, match="covid-qu-ex, Lung .*: expected Train and Val and Test in"):
        covid_qu_ex.prepare(root / "Test")
    with pytest.raises(FileNotFoundError, match="expected a folder, got .*nothing, which is none"):
        covid_qu_ex.prepare(covid / "nothing")


def test_covid_qu_ex_arguments(covid):
    with pytest.raises(ValueError, match="part: expected one of lung, infection, got 'heart'"):
        covid_qu_ex.prepare(covid, part="heart")
    with pytest.raises(ValueError, match="mask: expected lung masks for part 'lung', got 'infection masks'"):
        covid_qu_ex.prepare(covid, mask="infection masks")


def test_images_that_another_manifest_trains_on_are_dropped(covid, photographs):
    lung, infection = covid_qu_ex.prepare(covid).table, covid_qu_ex.prepare(covid, part="infection").table
    assert len(not_trained_on(infection, lung)) == 18
    trained = lung[lung["split"] == "train"].iloc[:1]
    victim = infection[infection["split"] == "test"].iloc[0]
    shutil.copyfile(trained["path"].iloc[0], victim["path"])
    infection = covid_qu_ex.prepare(covid, part="infection").table
    left = not_trained_on(infection, lung)
    assert set(infection["path"]) - set(left["path"]) == {victim["path"]}
    with pytest.raises(ValueError, match="trained: expected images that it does not train on, got none of 1"):
        not_trained_on(trained.assign(split="test"), lung)


@pytest.fixture
def kvasir(tmp_path, photographs):
    files = iter(photographs)
    for label, tract in hyperkvasir.LANDMARKS.items():
        for i in range(4 if label == "ileum" else 10):
            folder = tmp_path / "labeled-images" / tract / "anatomical-landmarks" / label
            put(next(files), folder / f"{label}-{i}.jpg")
    for i in range(5):
        put(next(files), tmp_path / "segmented-images/images" / f"{i}.jpg")
        pixels = np.zeros((300, 300), np.uint8)
        pixels[:150] = 255
        (tmp_path / "segmented-images/masks").mkdir(exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / "segmented-images/masks" / f"{i}.jpg", quality=60)
    (tmp_path / "segmented-images/bounding-boxes.json").write_text("{}")
    return tmp_path


def test_hyperkvasir_landmarks(kvasir):
    table, dropped = hyperkvasir.prepare(kvasir, validation=0.25, test=0.25)
    assert len(dropped) == 0
    counts = class_counts(table)
    assert counts.loc["ileum"].tolist() == [2, 1, 1]  # by class, so that the rare one is in each split
    assert counts.loc["cecum"].tolist() == [6, 2, 2]
    assert hyperkvasir.prepare(kvasir / "labeled-images", validation=0.25, test=0.25).table.equals(table)
    shutil.rmtree(kvasir / "labeled-images/upper-gi-tract/anatomical-landmarks/z-line")
    with pytest.raises(FileNotFoundError, match="got none: upper-gi-tract/anatomical-landmarks/z-line \\(published"):
        hyperkvasir.prepare(kvasir)
    with pytest.raises(ValueError, match="part: expected landmarks or polyps, got 'all'"):
        hyperkvasir.prepare(kvasir, part="all")


def test_hyperkvasir_polyps_have_masks_that_can_be_read(kvasir, tmp_path):
    table, dropped = hyperkvasir.prepare(kvasir, part="polyps", masks=tmp_path / "out", validation=0.2, test=0.2)
    assert len(dropped) == 0
    assert set(table["label"]) == {"polyp"}

    def transform(image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()

    inside = read_mask(table["mask"].iloc[0], transform, (300, 300))
    assert inside.sum() == 150 * 300
    assert set(inside.unique().tolist()) == {0.0, 1.0}
    assert (hyperkvasir.prepare(kvasir, part="polyps", validation=0.2, test=0.2).table["mask"] == "").all()
    shutil.rmtree(kvasir / "segmented-images/masks")
    with pytest.raises(FileNotFoundError, match="hyperkvasir, segmented-images: expected images and masks in"):
        hyperkvasir.prepare(kvasir, part="polyps")


WNIDS = ("n01440764", "n01443537", "n02102040")


@pytest.fixture
def kaggle(tmp_path, photographs):
    """Kaggle's layout: 12 validation images and 6 training images."""
    data = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    rows = []
    for i in range(12):
        name = f"ILSVRC2012_val_{i + 1:08d}"
        put(photographs[i], data / "val" / f"{name}.JPEG")
        rows.append(f"{name},{WNIDS[i % 3]} 1 2 30 40 {WNIDS[i % 3]} 5 6 70 80")
    for i in range(6):
        put(photographs[20 + i], data / "train" / WNIDS[i % 3] / f"{WNIDS[i % 3]}_{i}.JPEG")
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    (tmp_path / "kaggle/LOC_synset_mapping.txt").write_text("".join(f"{wnid} a fish, a name\n" for wnid in WNIDS))
    return tmp_path / "kaggle"


def plain(kaggle):
    """The same validation images in folders of their classes."""
    root = kaggle.parent / "plain"
    for i, path in enumerate(sorted((kaggle / imagenet.DATA / "val").iterdir())):
        put(path, root / "val" / WNIDS[i % 3] / "x.JPEG").rename(root / "val" / WNIDS[i % 3] / path.name)
    return root


def test_imagenet_in_both_layouts(kaggle):
    table, dropped = imagenet.prepare(kaggle, test=6, validation=3, train=4)
    assert len(dropped) == 0
    assert table["split"].value_counts().to_dict() == {"test": 6, "train": 4, "validation": 3}
    for path, label in zip(table["path"], table["label"], strict=True):
        stem = path.rpartition("/")[2].removesuffix(".JPEG")
        expected = stem.partition("_")[0] if "val" not in stem else WNIDS[(int(stem[-8:]) - 1) % 3]
        assert label == expected
    other = imagenet.prepare(plain(kaggle), test=6, validation=3).table
    columns = ["key", "label", "split"]
    kept = table.loc[table["split"] != "train", columns].reset_index(drop=True)
    assert other[columns].equals(kept)


def test_imagenet_subset_is_published():
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 50001)]
    test, validation = imagenet.subset(reversed(names))
    assert (len(test), len(validation)) == (10000, 1000)
    assert not {*test} & {*validation}
    assert hashlib.sha256("\n".join(test).encode()).hexdigest()[:16] == "9bf611123bcc880c"
    assert hashlib.sha256("\n".join(validation).encode()).hexdigest()[:16] == "234f663b01abbcfd"


def test_imagenet_parts_that_are_missing(kaggle):
    with pytest.raises(ValueError, match="val: expected at least 14 images to draw, got 12"):
        imagenet.prepare(kaggle, test=12, validation=2)
    with pytest.raises(ValueError, match="train: expected at least 7 images to draw, got 6"):
        imagenet.prepare(kaggle, test=1, validation=1, train=7)
    with pytest.raises(ValueError, match="test: expected at least 0, got -1"):
        imagenet.prepare(kaggle, test=-1)
    solution = kaggle / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="expected a class for each image of .*, got none for ILSVRC2012_val_00000012"):
        imagenet.prepare(kaggle, test=1, validation=1)
    solution.write_text("\n".join([*lines[:-1], "ILSVRC2012_val_00000012,n99999999 1 2 3 4"]))
    with pytest.raises(ValueError, match=r"expected classes of LOC_synset_mapping.txt in .*, got \['n99999999'\]"):
        imagenet.prepare(kaggle, test=1, validation=1)
    solution.unlink()
    with pytest.raises(FileNotFoundError, match="expected LOC_val_solution.csv in .*image-net.org"):
        imagenet.prepare(kaggle, test=1, validation=1)
    with pytest.raises(FileNotFoundError, match="imagenet: expected ILSVRC/Data/CLS-LOC/val or val in"):
        imagenet.prepare(kaggle.parent)
    (kaggle.parent / "val" / "cats").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="expected folders such as n01440764 in"):
        imagenet.prepare(kaggle.parent)


def test_splits_by_label_need_images_without_groups(kaggle):
    table = imagenet.prepare(kaggle, test=6, validation=3).table
    with pytest.raises(ValueError, match="by_label: expected images without a group"):
        split(table.assign(group="one"), by_label=True)
