"""The commands, on a tiny model and real files."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastfg
from fastfg.cli import main
from fastfg.models.timm import import_timm
from tests.tools import random_sae

NAME = "test_vit"  # timm's own tiny ViT: 64 wide, 6 blocks, patches of 16 pixels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with weights, SAEs, and images of which one is broken."""
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


@pytest.mark.parametrize("weights", ["vit.safetensors", "vit.pt"])
def test_attribute(files, tmp_path, capsys, weights):
    arguments = ["attribute", str(files / "images"), *model_arguments(files, weights), *gate_arguments(files)]
    assert main([*arguments, "--out", str(tmp_path), "--batch-size", "2"]) == 0
    table = pd.read_csv(tmp_path / "attributions.csv")
    assert list(table["map"]) == ["000000-[b].npy", "000001-a.npy", "000002-a.npy"]
    errors = pd.read_csv(tmp_path / "errors.csv")
    assert len(errors) == 1
    assert errors["file"][0].endswith("broken.png")
    assert "1 of 4 files could not be read" in capsys.readouterr().out.replace("\n", " ")
    from fastfg.cli.model import load_model
    from fastfg.models.timm import preprocessing

    model = load_model(NAME, files / weights, pretrained=False)
    image = preprocessing(model)(Image.open(files / "images" / "[b].png"))[None]
    gate = fastfg.Gate((1, 3), kappa=1.0)
    expected = fastfg.attribute(model, image, saes=fastfg.load_saes(files / "saes"), gate=gate).maps[0]
    np.testing.assert_allclose(np.load(tmp_path / table["map"][0]), expected.numpy(), rtol=1e-4)
    assert Image.open(tmp_path / table["overlay"][0]).size == (image.shape[-1], image.shape[-2])


def test_evaluate(files, tmp_path, capsys):
    arguments = ["evaluate", str(files / "images"), *model_arguments(files), *gate_arguments(files)]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert list(table["image"]) == ["[b].png"] * 2 + ["a.png"] * 2 + ["more/a.png"] * 2
    assert list(table["variant"]) == ["vanilla", "gated"] * 3
    assert table[["saco", "faithfulness_correlation", "pixel_flipping"]].notna().all(axis=None)
    assert "± " in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "SaCo" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"fastfg {fastfg.__version__}" in shown
    assert "relevancy" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", NAME], "weights: expected --weights FILE"),
        (["--model", NAME, "--weights", "nowhere.pt"], "weights: expected a file, got nowhere.pt"),
        (
            ["--model", "vit_tiny_patch16_224", "--weights", "{files}/vit.pt"],
            "weights: expected those of vit_tiny_patch16_224",
        ),
        (["--model", NAME, "--weights", "{files}/vit.pt", "--layers", "1"], "saes: expected --saes DIR"),
        (["--model", NAME, "--weights", "{files}/vit.pt", "--saes", "{files}/saes"], "layers: expected --layers"),
        (
            ["--model", NAME, "--weights", "{files}/vit.pt", "--saes", "{files}/saes", "--layers", "2"],
            "layers: expected blocks among [1, 3]",
        ),
        (
            ["--model", NAME, "--weights", "{files}/vit.pt", "--layers", "1", "--kappa", "-1"],
            "kappa: expected a number > 0",
        ),
    ],
)
def test_errors_are_one_line(files, tmp_path, capsys, arguments, message):
    arguments = [argument.format(files=files) for argument in arguments]
    assert main(["attribute", str(files / "images" / "a.png"), *arguments, "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: " + message)
    assert "Traceback" not in shown


def test_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        main(["attribute"])
    assert stopped.value.code == 2
