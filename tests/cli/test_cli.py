"""The commands, on a tiny model and real files."""

import csv
import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastfg
from fastfg import study
from fastfg.__main__ import entry
from fastfg.cli import main
from fastfg.cli.model import load_model
from fastfg.data import find_images, path_text
from fastfg.metrics import DEFAULT_METRICS
from fastfg.models.timm import import_timm, preprocessing
from fastfg.perturb import image_key
from tests.data.test_fuzz import NAMES
from tests.tools import random_sae

NAME = "test_vit"  # timm's own tiny ViT: 64 wide, 6 blocks, patches of 16 pixels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with weights, SAEs, and images, one of them broken."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = import_timm().create_model(NAME, num_classes=4)
    save_file(model.state_dict(), folder / "vit.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / "vit.pt")
    for block in (1, 3):
        random_sae(64, 128, "topk", k=8, seed=block, dtype=torch.float32).save(folder / "saes" / f"layer_{block}")
    (folder / "images" / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "[b].png", "more/a.png"):
        Image.fromarray(random.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "images" / name)
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "a.png").read_bytes()[:200])
    return folder


def model_arguments(files, weights="vit.safetensors"):
    return ["--model", NAME, "--weights", str(files / weights)]


def gate_arguments(files):
    return ["--saes", str(files / "saes"), "--layers", "1", "3", "--kappa", "1"]


def read_rows(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("weights", ["vit.safetensors", "vit.pt"])
def test_attribute(files, tmp_path, capsys, weights):
    arguments = ["attribute", str(files / "images"), *model_arguments(files, weights), *gate_arguments(files)]
    assert main([*arguments, "--out", str(tmp_path), "--batch-size", "2"]) == 0
    table = pd.read_csv(tmp_path / "attributions.csv")
    assert list(table["map"]) == ["000000-[b].npy", "000001-a.npy", "000003-a.npy"]
    assert list(table["path"]) == [str(files.resolve() / "images" / n) for n in ("[b].png", "a.png", "more/a.png")]
    assert table["warning"].isna().all()
    (error,) = read_rows(tmp_path / "errors.csv")
    assert error["path"].endswith("broken.png")
    assert error["error"].startswith("OSError: ")
    assert f"Skipped: 1 path, see {tmp_path / 'errors.csv'}" in capsys.readouterr().out
    model = load_model(NAME, files / weights, pretrained=False)
    image = preprocessing(model)(Image.open(files / "images" / "[b].png"))[None]
    gate = fastfg.Gate((1, 3), kappa=1.0)
    expected = fastfg.attribute(model, image, saes=fastfg.load_saes(files / "saes"), gate=gate)
    np.testing.assert_allclose(np.load(tmp_path / table["map"][0]), expected.maps[0].numpy(), rtol=1e-4)
    assert table["probability"][0] == pytest.approx(float(expected.logits.softmax(-1).amax()), rel=1e-4)
    assert table["key"][0] == image_key(image[0])
    assert Image.open(tmp_path / table["overlay"][0]).size == (image.shape[-1], image.shape[-2])


def evaluated(images, out, *more):
    assert main(["evaluate", *map(str, images), "--out", str(out), "--patches-per-step", "49", *more]) == 0
    return pd.read_parquet(out / "scores.parquet")


def test_evaluate(files, tmp_path, capsys):
    folder, model = files / "images", model_arguments(files)
    table = evaluated([folder], tmp_path / "all", *model, *gate_arguments(files))
    paths = [str(files.resolve() / "images" / name) for name in ("[b].png", "a.png", "more/a.png")]
    assert list(table.columns[:4]) == ["path", "key", "variant", "target"]
    assert list(table["path"]) == [path for path in paths for _ in range(2)]
    assert list(table["variant"]) == ["vanilla", "gated"] * 3
    assert table[list(DEFAULT_METRICS)].notna().all(axis=None)
    assert "± " in (tmp_path / "all" / "table.md").read_text(encoding="utf-8")
    assert "SaCo" in capsys.readouterr().out
    attributions = pd.read_csv(all_maps(files, tmp_path / "all") / "attributions.csv")
    joined = attributions.merge(table, on=["path", "key"])
    assert len(joined) == len(table)

    # one image has one key and one score: from Python, in any batch, from any folder, and by itself
    vit = load_model(NAME, files / "vit.safetensors", pretrained=False)
    image = preprocessing(vit)(Image.open(folder / "more" / "a.png"))[None]
    found = fastfg.attribute(
        vit, image, saes=fastfg.load_saes(files / "saes"), gate=[None, fastfg.Gate((1, 3), kappa=1.0)]
    )
    scores = fastfg.evaluate(vit, image, found.maps, target=found.target, pixel_flipping={"patches_per_step": 49})
    ways = [
        evaluated([folder / "more"], tmp_path / "sub", *model, *gate_arguments(files)),
        evaluated([folder / "more" / "a.png"], tmp_path / "one", *model, *gate_arguments(files), "--batch-size", "1"),
        evaluated([folder], tmp_path / "two", *model, *gate_arguments(files), "--batch-size", "2"),
        table,
    ]
    for way in ways:
        rows = way[way["path"] == paths[2]]
        assert set(rows["key"]) == set(scores.image_keys)
        for metric in DEFAULT_METRICS:
            np.testing.assert_allclose(rows[metric], scores[metric][:, 0], rtol=1e-3, atol=1e-4)


def test_metrics_and_methods(files, tmp_path, capsys):
    more = ["--metrics", "srg", "random_logit", "--methods", "random", "grad_cam", "--baseline", "removed"]
    table = evaluated([files / "images" / "a.png"], tmp_path / "out", *model_arguments(files), *more)
    assert list(table.columns) == ["path", "key", "variant", "target", "srg", "random_logit"]
    assert list(table["variant"]) == ["vanilla", "random", "grad_cam"]
    assert table[["srg", "random_logit"]].notna().all(axis=None)
    assert "Which differences are real" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.fixture
def photographs(tmp_path):
    """Two photographs, with a mask of the bright pixels of the first one."""
    datasets = pytest.importorskip("sklearn.datasets")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "masks").mkdir()
    for name in ("flower", "china"):
        photo = datasets.load_sample_image(f"{name}.jpg")
        Image.fromarray(photo).save(tmp_path / "photos" / f"{name}.png")
    bright = datasets.load_sample_image("flower.jpg").mean(-1) > 110
    Image.fromarray(np.where(bright, 255, 0).astype(np.uint8)).save(tmp_path / "photos" / "masks" / "flower.png")
    return tmp_path / "photos"


def test_masks(files, photographs, tmp_path, capsys):
    """The scores are those of Python; the photograph without a mask has a reason, and the mask is not judged itself."""
    from fastfg.data import read_image, read_mask

    arguments = [*model_arguments(files), "--metrics", "roc_auc", "saco", "--methods", "edges", "--masks"]
    table = evaluated([photographs], tmp_path / "out", *arguments, str(photographs / "masks"))
    assert [Path(path).name for path in table["path"]] == ["china.png"] * 2 + ["flower.png"] * 2
    assert table["saco"].notna().all()
    assert table["roc_auc"].isna().tolist() == [True, True, False, False]
    missing = read_rows(tmp_path / "out" / "score_errors.csv")
    assert [(Path(row["path"]).name, row["metric"], row["message"]) for row in missing] == [
        ("china.png", "roc_auc", f"no mask: expected china.* in {photographs / 'masks'}")
    ] * 2
    (left,) = read_rows(tmp_path / "out" / "errors.csv")
    assert (Path(left["path"]).name, left["error"]) == ("flower.png", "in the folder of the masks")
    assert "Judging 2 images x 2 variants" in capsys.readouterr().out

    vit = load_model(NAME, files / "vit.safetensors", pretrained=False)
    picture = read_image(photographs / "flower.png").image
    image = preprocessing(vit)(picture)[None]
    mask = read_mask(photographs / "masks" / "flower.png", preprocessing(vit), picture.size)[None]
    found = fastfg.attribute(vit, image, methods=["edges"])
    maps = torch.stack([found.maps, found.methods["edges"]])
    expected = fastfg.evaluate(vit, image, maps, target=found.target, metrics=["roc_auc"], masks=mask)["roc_auc"]
    np.testing.assert_allclose(table["roc_auc"][2:], expected[:, 0], rtol=1e-3)

    Image.new("L", (5, 5)).save(photographs / "masks" / "china.png")
    again = evaluated([photographs], tmp_path / "out", *arguments, str(photographs / "masks"))
    assert again["roc_auc"].equals(table["roc_auc"])
    reasons = {row["message"] for row in read_rows(tmp_path / "out" / "score_errors.csv")}
    assert reasons == {
        f"mask {photographs / 'masks' / 'china.png'}: ValueError: mask: expected 640 x 427 pixels, as the image has, "
        "got 5 x 5"
    }


def test_groups_and_equal_images(files, photographs, tmp_path, capsys):
    shutil.copy(photographs / "flower.png", photographs / "again.png")
    shutil.copy(photographs / "masks" / "flower.png", photographs / "masks" / "china.png")
    table = pd.DataFrame({"image": ["china.png", "photos/flower.png", "again.png"], "group": ["01", "01", "02"]})
    table.to_csv(tmp_path / "groups.csv", index=False)
    table.to_parquet(tmp_path / "groups.parquet")
    images = [photographs / name for name in ("china.png", "flower.png", "again.png")]
    arguments = [*model_arguments(files), "--metrics", "iou", "--methods", "edges", "--masks"]
    arguments += [str(photographs / "masks"), "--groups"]
    shutil.copy(photographs / "masks" / "china.png", photographs / "masks" / "again.png")
    for name in ("groups.csv", "groups.parquet"):
        found = evaluated(images, tmp_path / "out", *arguments, str(tmp_path / name))
        assert list(found.columns) == ["path", "key", "group", "variant", "target", "iou"]
        assert found["group"].tolist() == ["01", "01", "01", "01", "02", "02"]
    (row,) = study.paired(found).to_dict("records")
    assert (row["n"], row["groups"], row["verdict"]) == (3, 1, "not tested")  # flower and again are one picture
    assert "Same pixels as another image: 1 image; the tests count each picture once" in capsys.readouterr().out
    assert "| 3 in 1 group |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "iou", "saco"], "masks: expected --masks DIR, or a manifest with masks, with iou, got none"),
        (["--masks", "{files}"], "metrics: expected one of pointing_game, "),
        (["--metrics", "iou", "--masks", "{files}/vit.pt"], "masks: expected a folder, got {files}/vit.pt"),
        (["--metrics", "iou", "--masks", "{files}/saes"], "masks: expected a file with the name of an image, such as"),
        (["--groups", "{files}/vit.pt"], "groups: expected a .csv or .parquet file, got {files}/vit.pt"),
        (["--groups", "{files}/nowhere.csv"], "groups: expected a file, got"),
        (["--groups", "{files}/columns.csv"], "groups: expected the columns 'image' and 'group' in"),
        (["--groups", "{files}/none.csv"], "groups: expected a group in {files}/none.csv for each image, got none for"),
        (["--groups", "{files}/empty.csv"], "groups: expected a group for each image in {files}/empty.csv, got none"),
        (["--groups", "{files}/several.csv"], "groups: expected one group per image in {files}/several.csv, got"),
        (["--groups", "{files}/short.csv"], "groups: expected names in {files}/short.csv that tell the images apart"),
    ],
)
def test_masks_and_groups_that_do_not_fit(files, tmp_path, capsys, arguments, message):
    tables = {"columns": "path,group\na.png,1", "none": "image,group\nb.png,1", "empty": "image,group\na.png,"}
    tables |= {"several": "image,group\na.png,1\na.png,2", "short": "image,group\na.png,1"}
    for name, text in tables.items():
        (files / f"{name}.csv").write_text(text)
    images = [str(files / "images" / name) for name in ("a.png", "more/a.png")]
    arguments = [argument.format(files=files) for argument in arguments]
    assert main(["evaluate", *images, *model_arguments(files), "--out", str(tmp_path), *arguments]) == 1
    check_error(capsys, message.format(files=files))


@pytest.mark.parametrize("option", ["--methods", "--metrics"])
def test_a_name_that_is_given_twice_is_a_wrong_command_line(capsys, option):
    name = {"--methods": "random", "--metrics": "saco"}[option]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "a.png", "--model", NAME, "--out", "o", option, name, name])
    assert stopped.value.code == 2
    check_error(capsys, f"argument {option}: expected each name once, got {name!r} twice")


def all_maps(files, out):
    assert main(["attribute", str(files / "images"), *model_arguments(files), "--out", str(out)]) == 0
    return out


def test_earlier_output_is_not_explained_again(files, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(files / "images", folder)
    arguments = ["attribute", str(folder), *model_arguments(files), "--out"]
    for out in (folder / "out", folder / "out", tmp_path / "other"):
        assert main([*arguments, str(out)]) == 0
        assert len(read_rows(out / "attributions.csv")) == 3
    assert {row["error"] for row in read_rows(tmp_path / "other" / "errors.csv")} >= {
        "earlier output of fastfg (the folder holds fastfg.json)"
    }
    written = json.loads((folder / "out" / "fastfg.json").read_text())
    assert written["command"] == "attribute"
    assert written["settings"]["model"] == NAME


def test_files_with_the_same_content_have_their_own_rows(files, tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        shutil.copy(files / "images" / "a.png", tmp_path / name)
    shutil.copy(files / "images" / "[b].png", tmp_path / "c.png")
    whole = study.compare_batch

    def failing(*arguments, **options):
        found = whole(*arguments, **options)
        for image in (0, 1):  # the same content has the same errors
            key = found.scores["image"][image * len(options["gates"])]
            error = {"index": image, "image": key, "variant": "vanilla", "metric": "saco", "message": "why"}
            found.errors.loc[len(found.errors)] = pd.Series({name: error[name] for name in found.errors})
        return found

    monkeypatch.setattr(study, "compare_batch", failing)
    names = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    table = evaluated(names, tmp_path / "out", *model_arguments(files))
    assert [Path(path).name for path in table["path"]] == ["a.png", "b.png", "c.png"]
    assert table["key"][0] == table["key"][1] != table["key"][2]
    missing = pd.read_csv(tmp_path / "out" / "score_errors.csv")
    assert [Path(path).name for path in missing["path"]] == ["a.png", "b.png"]
    assert list(missing["message"]) == ["why", "why"]


def test_a_map_that_explains_nothing_is_marked(files, tmp_path, capsys):
    Image.new("RGB", (90, 70), (7, 8, 9)).save(tmp_path / "blank.png")
    shutil.copy(files / "images" / "a.png", tmp_path / "constant.png")
    # If the attention does not change the output, no patch has any relevance.
    state = load_file(files / "vit.safetensors")
    save_file(
        {name: torch.zeros_like(v) if "attn.proj" in name else v for name, v in state.items()},
        tmp_path / "w.safetensors",
    )
    arguments = [str(tmp_path / "blank.png"), str(tmp_path / "constant.png"), "--model", NAME]
    assert (
        main(["attribute", *arguments, "--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out")])
        == 0
    )
    rows = read_rows(tmp_path / "out" / "attributions.csv")
    assert [row["warning"] for row in rows] == [
        "blank image: all pixels are equal",
        "constant map: all patches are equal",
    ]
    assert "Warning: 2 maps cannot explain anything" in capsys.readouterr().out


def test_more_than_eight_bits(files, tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (70, 90), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values // 16).astype(np.uint8)).save(tmp_path / "flat.png")
    arguments = ["attribute", str(tmp_path), *model_arguments(files), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (row,) = read_rows(tmp_path / "out" / "windows.csv")
    assert (Path(row["path"]).name, float(row["low"]), float(row["high"])) == ("deep.png", values.min(), values.max())
    assert row["key"] in {row["key"] for row in read_rows(tmp_path / "out" / "attributions.csv")}
    assert "Windowed by their own range or window: 1 image with more than 8 bits" in capsys.readouterr().out
    assert main([*arguments, "--window", "0", "4080"]) == 1
    check_error(capsys, "window: expected None, as in the results in")
    assert main([*arguments[:-1], str(tmp_path / "other"), "--window", "0", "4080"]) == 0
    (row,) = read_rows(tmp_path / "other" / "windows.csv")
    assert (float(row["low"]), float(row["high"])) == (0, 4080)
    assert "own range" not in capsys.readouterr().out


def test_odd_names(files, tmp_path, capsys):
    folder = os.fsencode(tmp_path / "odd")
    (tmp_path / "odd").mkdir()
    for name in NAMES:
        shutil.copy(files / "images" / "a.png", os.fsdecode(os.path.join(folder, name)))  # noqa: PTH118
    arguments = ["attribute", str(tmp_path / "odd"), *model_arguments(files), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    rows = read_rows(tmp_path / "out" / "attributions.csv")
    assert [row["path"] for row in rows] == [path_text(path) for path in find_images([tmp_path / "odd"]).paths]
    assert len({row["map"] for row in rows}) == len(NAMES)
    assert all((tmp_path / "out" / row[column]).is_file() for row in rows for column in ("map", "overlay"))
    assert main([*arguments, os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("command", ["attribute", "evaluate"])
def test_finished_work_is_kept(files, tmp_path, monkeypatch, capsys, command, stop):
    whole, calls = fastfg.attribute, []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise stop("stopped")
        return whole(*arguments, **options)

    for module in ("fastfg.attribution.attribute", "fastfg.study.comparison"):
        monkeypatch.setattr(importlib.import_module(module), "attribute", stopping)
    arguments = [command, str(files / "images"), *model_arguments(files), "--out", str(tmp_path), "--batch-size", "1"]
    more = ["--patches-per-step", "49"] if command == "evaluate" else []
    if stop is KeyboardInterrupt:
        assert main([*arguments, *more]) == 130
        assert "error: interrupted; finished work is kept" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            main([*arguments, *more])
    if command == "evaluate":
        assert len(pd.read_parquet(tmp_path / "scores.parquet")) == 2
    else:
        assert len(read_rows(tmp_path / "attributions.csv")) == 2
    assert len(read_rows(tmp_path / "errors.csv")) in (0, 1)


@pytest.mark.parametrize("command", ["attribute", "evaluate"])
def test_no_readable_image_is_an_error(files, tmp_path, capsys, command):
    (tmp_path / "images" / "bare").mkdir(parents=True)
    arguments = [command, *model_arguments(files), "--out", str(tmp_path / "out")]
    assert main([*arguments, str(tmp_path / "images")]) == 1
    assert "error: IMAGE: expected at least one readable image, got none (no file there)" in capsys.readouterr().err
    (tmp_path / "images" / "notes.txt").write_text("")
    (tmp_path / "images" / "broken.png").write_bytes((files / "images" / "broken.png").read_bytes())
    assert main([*arguments, str(tmp_path / "images")]) == 1
    assert "error: IMAGE: expected at least one readable image, got none (2 skipped)" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "out" / "errors.csv")) == 2


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"fastfg {fastfg.__version__}" in shown
    assert "relevancy" in shown


WEIGHTS = ["--weights", "{files}/vit.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", NAME], "weights: expected --weights FILE"),
        (
            ["--model", NAME, "--weights", "nowhere.pt"],
            "weights: expected a file, got nowhere.pt, which does not exist",
        ),
        (["--model", NAME, "--weights", "{files}"], "weights: expected a file, got {files}, which is a folder"),
        (["--model", NAME, "--weights", "{files}/garbage.pt"], "weights: expected a state dict of tensors"),
        (["--model", NAME, "--weights", "{files}/garbage.safetensors"], "weights: expected a state dict of tensors"),
        (["--model", NAME, "--weights", "{files}/pickle.pt"], "weights: expected a state dict of tensors"),
        (["--model", NAME, "--weights", "{files}/list.pt"], "weights: expected a state dict {{name: tensor}}"),
        (
            ["--model", NAME, "--weights", "{files}/head.pt"],
            "weights: expected those of test_vit, got a state dict with",
        ),
        (
            ["--model", "vit_tiny_patch16_224", *WEIGHTS],
            "weights: expected those of vit_tiny_patch16_224, got a state dict with no ",
        ),
        (["--model", "test_vti", *WEIGHTS], "model: expected the name of a timm model, got 'test_vti'"),
        (["--model", "", *WEIGHTS], "model: expected the name of a timm model"),
        (["--model", "test_resnet", "--weights", "{files}/resnet.pt"], "model: expected a fastfg.models.Adapter"),
        (
            ["--model", NAME, *WEIGHTS, "--device", "nonsense"],
            "device: expected one that torch can use here, got 'nonsense'",
        ),
        (["--model", NAME, *WEIGHTS, "--device", "meta"], "device: expected one that torch can use here, got 'meta'"),
        (
            ["--model", NAME, *WEIGHTS, "--device", "cuda:77"],
            "device: expected one that torch can use here, got 'cuda:77'",
        ),
        (["--model", NAME, *WEIGHTS, "--target", "4"], "target: expected classes from 0 to 3, got [4]"),
        (["--model", NAME, *WEIGHTS, "--target", "-1"], "target: expected classes from 0 to 3, got [-1]"),
        (["--model", NAME, *WEIGHTS, "--layers", "1"], "saes: expected --saes DIR"),
        (["--model", NAME, *WEIGHTS, "--saes", "{files}/saes"], "layers: expected --layers L [L ...] with --saes, got"),
        (["--model", NAME, *WEIGHTS, "--kappa", "-1"], "layers: expected --layers L [L ...] with --kappa, got none"),
        (["--model", NAME, *WEIGHTS, "--kappa", "0.5"], "layers: expected --layers L [L ...] with --kappa, got none"),
        (
            ["--model", NAME, *WEIGHTS, "--c-max", "10", "--score", "gradient"],
            "layers: expected --layers L [L ...] with --c-max, --score, got none",
        ),
        (
            ["--model", NAME, *WEIGHTS, "--saes", "{files}/saes", "--layers", "2"],
            "layers: expected blocks among [1, 3]",
        ),
        (
            ["--model", NAME, *WEIGHTS, "--saes", "{files}/nowhere", "--layers", "2"],
            "path: expected an SAE file or folder",
        ),
        (
            ["--model", NAME, *WEIGHTS, "--score", "gradient_x_residual", "--layers", "99"],
            "gate.layers: expected blocks from 0 to",
        ),
        (["--model", NAME, *WEIGHTS, "--layers", "-1"], "layers: expected distinct 0-based blocks"),
        (["--model", NAME, *WEIGHTS, "--layers", "1", "--kappa", "-1"], "kappa: expected a number > 0"),
        (
            ["--model", NAME, *WEIGHTS, "--window", "5", "5"],
            "window: expected LOW HIGH, finite, with LOW < HIGH, got 5.0",
        ),
        (["--model", NAME, *WEIGHTS, "--max-aspect", "0"], "max_aspect: expected at least 1, got 0.0"),
        (
            ["--model", NAME, *WEIGHTS, "--out", "{files}"],
            "out: expected a new or empty folder, or one with earlier output",
        ),
        (["--model", NAME, *WEIGHTS, "--out", "{files}/vit.pt"], "out: expected a folder, got"),
        (["--model", NAME, *WEIGHTS, "--out", "/proc/fastfg"], "[Errno"),
    ],
)
def test_errors_are_one_line(files, wrong_files, tmp_path, capsys, arguments, message):
    arguments = [argument.format(files=files) for argument in arguments]
    assert main(["attribute", str(files / "images" / "a.png"), "--out", str(tmp_path), *arguments]) == 1
    check_error(capsys, message.format(files=files))


def test_images_that_are_not_there(files, tmp_path, capsys):
    arguments = ["attribute", "nowhere.png", *model_arguments(files), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    check_error(capsys, "images: expected a file or folder, got nowhere.png, which does not exist")
    assert not (tmp_path / "out").exists()


def check_error(capsys, message):
    shown = capsys.readouterr().err
    assert shown.startswith("error: " + message)
    assert shown.count("\n") == 1
    assert "Traceback" not in shown


@pytest.fixture(scope="module")
def wrong_files(files):
    """The weights, and files that are not weights."""
    for suffix in ("pt", "safetensors"):
        (files / f"garbage.{suffix}").write_bytes(b"garbage" * 100)
    torch.save({"model": Path("a")}, files / "pickle.pt")
    torch.save([1, 2], files / "list.pt")
    torch.save({"head.weight": torch.ones(4, 3)}, files / "head.pt")
    torch.save(import_timm().create_model("test_resnet").state_dict(), files / "resnet.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute"], "the following arguments are required"),
        (["--batch-size", "0"], "argument --batch-size: expected an integer of at least 1, got '0'"),
        (["--batch-size", "-3"], "argument --batch-size: expected an integer of at least 1, got '-3'"),
        (["--target", "cat"], "argument --target: expected the number of a class, or label, got 'cat'"),
        (["--window", "1"], "argument --window: expected 2 arguments"),
        (["--out", ""], "argument --out: expected the name of a file or folder, got ''"),
        (["--weights", ""], "argument --weights: expected the name of a file or folder, got ''"),
        (["--saes", ""], "argument --saes: expected the name of a file or folder, got ''"),
        (["--score", "nonsense"], "argument --score: invalid choice: 'nonsense'"),
    ],
)
def test_usage(capsys, arguments, message):
    whole = (
        arguments if arguments == ["attribute"] else ["attribute", "a.png", "--model", NAME, "--out", "o", *arguments]
    )
    with pytest.raises(SystemExit) as stopped:
        main(whole)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: " + message)
    assert shown.endswith("(see fastfg attribute --help)\n")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("images", [[""], ["a.png", ""]])
def test_an_empty_name_is_not_the_current_folder(capsys, images):
    with pytest.raises(SystemExit) as stopped:
        main(["attribute", *images, "--model", NAME, "--out", "o"])
    assert stopped.value.code == 2
    check_error(capsys, "argument IMAGE: expected the name of a file or folder, got ''")


@pytest.mark.parametrize("command", [[], ["attribute"], ["evaluate"], ["demo"], ["convert-sae"], ["info"]])
def test_help(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "{" not in line]  # argparse does not break a list of choices
    assert max(map(len, lines)) <= 80
    assert "Exit codes" in shown or command in (["demo"], ["convert-sae"], ["info"])


def test_the_defaults_of_the_gate(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["attribute", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    gate = fastfg.Gate((1, 3))
    for value in (gate.kappa, gate.c_max, gate.score):
        assert f"(default: {value})" in shown
    arguments = ["attribute", str(files / "images" / "a.png"), *model_arguments(files), "--saes", str(files / "saes")]
    assert main([*arguments, "--layers", "1", "3", "--c-max", "3", "--out", str(tmp_path)]) == 0
    settings = json.loads((tmp_path / "fastfg.json").read_text())["settings"]
    assert (settings["kappa"], settings["c_max"], settings["score"]) == (gate.kappa, 3.0, gate.score)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastfg {fastfg.__version__}\n"


def test_an_interrupt_while_the_command_line_is_built(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("fastfg.cli.main", interrupted)
    with pytest.raises(SystemExit) as stopped:
        entry()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "error: interrupted before anything was begun\n"
