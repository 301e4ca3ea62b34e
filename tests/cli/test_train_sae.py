"""``fastfg train-sae`` from images to SAEs that ``fastfg attribute`` takes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastfg
from fastfg.cli import main
from fastfg.models.timm import import_timm
from fastfg.study import TokenCache

MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and weights."""
    found = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (found / "images").mkdir()
    for i in range(6):
        pixels = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        pixels.resize((64, 64)).save(found / "images" / f"{i}.png")
    torch.manual_seed(0)
    torch.save(import_timm().create_model(MODEL, depth=3).state_dict(), found / "weights.pt")
    return found


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """The model has three blocks."""
    timm = import_timm()
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=3, **options))


def command(folder, out, *more, layers=("0-1",)):
    model = ["--model", MODEL, "--weights", str(folder / "weights.pt")]
    sizes = ["--expansion", "1", "--k", "4", "--batch-tokens", "256", "--held-out", "0.3", "--buffer", "600"]
    return ["train-sae", str(folder / "images"), *model, *sizes, "--layers", *layers, "--out", str(out), *more]


def test_from_images_to_maps(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(folder, out, "--kinds", "trained", "random", "--epochs", "2")) == 0
    printed = capsys.readouterr().out
    assert "1,176 tokens of 6 images per block" in printed
    assert "784 tokens of 4 images to train on, 2 images held out" in printed
    assert "fastfg attribute IMAGES ... --saes OUT/trained --layers 0 1" in printed.replace("\n", "")
    rows = list(csv.DictReader((out / "saes.csv").open()))
    assert [(row["kind"], row["layer"]) for row in rows] == [(k, b) for k in ("trained", "random") for b in "01"]
    assert float(rows[0]["explained_variance"]) > float(rows[2]["explained_variance"]) > 0
    assert [row["steps"] for row in rows] == ["6", "6", "0", "0"]
    given = json.loads((out / "trained" / "layer_1" / "report.json").read_text())
    assert given["recipe"]["n_features"] == 192
    assert given["recipe"]["k_aux"] == 128  # near d / 2 = 96
    assert given["recipe"]["dead_after"] == 256  # a tenth of the run is less than a batch
    with pytest.raises(ValueError, match=r"got .* \(did you mean .*trained or .*random\?\)"):
        fastfg.load_saes(out)
    image, model = str(folder / "images" / "0.png"), command(folder, out)[2:6]
    maps = ["attribute", image, *model, "--saes", str(out / "trained"), "--layers", "1", "--out", str(tmp_path / "a")]
    assert main(maps) == 0
    assert main(command(folder, out, "--kinds", "trained", "random", "--epochs", "2")) == 0  # nothing is left to do


def test_batch_topk_with_prefixes(folder, tmp_path, capsys):
    options = ["--activation", "batch_topk", "--prefixes", "0.25", "1"]
    assert main(command(folder, tmp_path / "out", *options, layers=["1"])) == 0
    capsys.readouterr()
    (row,) = csv.DictReader((tmp_path / "out" / "saes.csv").open())
    assert float(row["l0"]) == pytest.approx(4, rel=0.25)  # as the threshold gives it
    config = json.loads((tmp_path / "out" / "trained" / "layer_1" / "config.json").read_text())
    assert (config["activation"], config["k"]) == ("batch_topk", None)
    assert config["provenance"]["recipe"]["prefixes"] == [0.25, 1.0]
    image, model = str(folder / "images" / "0.png"), command(folder, tmp_path)[2:6]
    saes = ["--saes", str(tmp_path / "out" / "trained"), "--layers", "1"]
    assert main(["attribute", image, *model, *saes, "--out", str(tmp_path / "a")]) == 0


def test_saes_of_another_model_are_refused(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", layers=["1"])) == 0
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    torch.save(import_timm().create_model(MODEL).state_dict(), other)
    arguments = ["attribute", str(folder / "images"), "--model", MODEL, "--weights", str(other), "--layers", "1"]
    assert main([*arguments, "--saes", str(tmp_path / "out" / "trained"), "--out", str(tmp_path / "a")]) == 1
    assert "saes: expected SAEs of this model's weights, got SAEs of other weights" in capsys.readouterr().err


def test_only_the_images_that_are_named_are_used(folder, tmp_path, capsys):
    """The folder of tokens may hold others, such as those of a test set."""
    assert main(command(folder, tmp_path / "all", layers=["1"])) == 0
    few = tmp_path / "few"
    few.mkdir()
    for i in range(4):
        (few / f"{i}.png").write_bytes((folder / "images" / f"{i}.png").read_bytes())
    arguments = command(folder, tmp_path / "out", "--tokens", str(tmp_path / "all" / "tokens"), layers=["1"])
    arguments[1] = str(few)
    assert main(arguments) == 0
    assert "784 tokens of 4 images per block" in (printed := capsys.readouterr().out)
    assert "beside 2 images that this command does not use" in printed.replace("\n", " ")
    data = json.loads((tmp_path / "out" / "trained" / "layer_1" / "report.json").read_text())["data"]
    assert (data["images"], data["held_out_images"]) == (3, 1)


def test_the_table_has_the_saes_of_earlier_calls(folder, tmp_path):
    for kind in ("trained", "random"):
        assert main(command(folder, tmp_path / "out", "--kinds", kind, layers=["1"])) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "saes.csv").open()))
    assert [row["kind"] for row in rows] == ["trained", "random"]


def test_groups_stay_on_one_side(folder, tmp_path):
    groups = tmp_path / "groups.csv"
    groups.write_text("image,group\n" + "".join(f"{i}.png,{i // 2}\n" for i in range(6)))
    assert main(command(folder, tmp_path / "out", "--groups", str(groups), layers=["2"])) == 0
    data = json.loads((tmp_path / "out" / "trained" / "layer_2" / "report.json").read_text())["data"]
    assert (data["images"], data["held_out_images"], data["grouped"]) == (4, 2, True)


@pytest.mark.parametrize("acts", [False, True])
def test_a_limit_that_never_acted_is_said(folder, tmp_path, capsys, acts):
    options = ["--steps", "80", "--lr", "0.03"] if acts else ["--steps", "2"]
    assert main(command(folder, tmp_path / "out", "--kinds", "trained", "soft-frozen", *options, layers=["1"])) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    none = "soft-frozen, block 1: no dictionary row was ever at the limit, a cosine of 0.8 with its start. The limit"
    assert (none in printed) != acts
    assert ("% of the dictionary rows were at the limit, a cosine of 0.8 with their start" in printed) == acts
    assert "trained, block 1: no dictionary row" not in printed
    trained, soft = csv.DictReader((tmp_path / "out" / "saes.csv").open())
    assert trained["rows_at_limit"] == ""
    assert (float(soft["rows_at_limit"]) > 0) == acts


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--held-out", "0.01"], "held-out: expected a share that leaves some of 6 images on both sides, got 0.01"),
        (
            ["--held-out", "0.5", "--groups", "GROUPS"],
            "held-out: expected a share that leaves some of 1 groups on both sides",
        ),
        (
            ["--batch-tokens", "785", "--buffer", "1570"],
            "batch-tokens: expected at most 784, the tokens to train on, got 785",
        ),
        (
            ["--tokens-per-image", "4", "--batch-tokens", "17"],
            "batch-tokens: expected at most 16, the tokens to train on, got 17",
        ),
        (["--tokens-per-image", "197"], "tokens-per-image: expected at most 196, the patches per image, got 197"),
        (["--k", "193"], "k: expected 1 to n_features=192, got 193"),
        (["--prefixes", "0.001", "1"], "prefixes: expected increasing shares of the 192 features"),
        (["--groups", "none.csv"], "none.csv"),
    ],
)
def test_what_is_known_before_is_told_before_tokens_are_written(folder, tmp_path, capsys, more, message):
    groups = tmp_path / "groups.csv"
    groups.write_text("image,group\n" + "".join(f"{i}.png,same\n" for i in range(6)))
    more = [str(groups) if one == "GROUPS" else one for one in more]
    assert main(command(folder, tmp_path / "out", *more, layers=["1"])) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_images_that_can_not_be_read_are_counted_later(folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        content = (folder / "images" / f"{i}.png").read_bytes()
        (images / f"{i}.png").write_bytes(content if i < 1 else content[:100])
    arguments = command(folder, tmp_path / "out", layers=["1"])
    arguments[1] = str(images)
    assert main(arguments) == 1
    assert "held_out: expected a share that leaves some of 1 on both sides, got 0.3" in capsys.readouterr().err
    assert (tmp_path / "out" / "errors.csv").exists()


def test_the_tokens_fill_what_they_may_take(folder, tmp_path, capsys):
    size = 196 * 192 * 2  # bytes of an image
    limit = ["--max-gigabytes", str(4.5 * size / 1e9)]
    assert main(command(folder, tmp_path / "out", *limit, layers=["1"])) == 1
    done = capsys.readouterr()
    said = f"max_bytes: expected room for more than 4 images, got {round(4.5 * size)} bytes; one image takes {size}"
    assert said in done.err.replace("\n", " ")
    assert f"The tokens of 6 images may take {6 * size / 1e9:.3g} GB" in done.out.replace("\n", " ")
    assert len(TokenCache(tmp_path / "out" / "tokens").keys) == 4
    assert main(command(folder, tmp_path / "out", layers=["1"])) == 0  # without the limit, the run goes on


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "5", "--steps", "60"], "argument --steps: not allowed with argument --epochs"),
        (["--epochs", "1", "--steps", "60"], "argument --steps: not allowed with argument --epochs"),
        (["--features", "100", "--expansion", "1"], "argument --expansion: not allowed with argument --features"),
        (["--features", "100", "--expansion", "64"], "argument --expansion: not allowed with argument --features"),
    ],
)
def test_options_that_exclude_each_other(folder, tmp_path, capsys, more, message):
    arguments = command(folder, tmp_path / "out")
    at = arguments.index("--expansion")
    with pytest.raises(SystemExit) as stopped:
        main([*arguments[:at], *arguments[at + 2 :], *more])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "layers", "code", "message"),
    [
        ([], ["3-1"], 2, "argument --layers: expected a block or a range of blocks, such as 4 or 2-10, got '3-1'"),
        ([], ["7"], 1, "layers: expected blocks from 0 to 2"),
        (["--kinds", "frozen"], ["1"], 2, "argument --kinds: invalid choice: 'frozen'"),
        (["--prefixes", "0.5"], ["1"], 1, "prefixes: expected increasing shares of the 192 features"),
        (["--activation", "relu"], ["1"], 2, "argument --activation: invalid choice: 'relu'"),
        (["--k", "500"], ["1"], 1, "k: expected 1 to n_features=192, got 500"),
        (
            ["--batch-tokens", "5000", "--buffer", "10000"],
            ["1"],
            1,
            "batch-tokens: expected at most 784, the tokens to train on, got 5000",
        ),
        (["--max-gigabytes", "0.0000001"], ["1"], 1, "max_bytes: expected room for more than 0 images"),
        (["--held-out", "2"], ["1"], 2, "argument --held-out: expected a number between 0 and 1, got '2'"),
        (["--max-gigabytes", "inf"], ["1"], 2, "argument --max-gigabytes: expected a number above 0, got 'inf'"),
        (["--lr", "0"], ["1"], 1, "lr: expected a number > 0, got 0.0"),
        (["--seed", "-1"], ["1"], 1, "seed: expected at least 0, got -1"),
        (["--lr", "1e30"], ["1"], 1, "lr: expected training to stay finite"),
        (["--buffer", "300"], ["1"], 1, "buffer: expected at least two batches, 512, got 300"),
        (["--groups", "none.csv"], ["1"], 1, "none.csv"),
    ],
)
def test_wrong_command_lines_are_one_line(folder, tmp_path, capsys, more, layers, code, message):
    try:
        found = main(command(folder, tmp_path / "out", *more, layers=layers))
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
