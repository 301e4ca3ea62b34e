"""``attribute`` and ``evaluate`` write each batch as it is done, go on where they were, and share the images."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import fastfg
from fastfg import study
from fastfg.cli import main
from fastfg.cli.results import Results
from fastfg.models.timm import import_timm
from tests.cli.test_cli import NAME, check_error, files, gate_arguments, model_arguments, read_rows  # noqa: F401

QUICK = ["--metrics", "srg", "--patches-per-step", "49", "--batch-size", "1"]


@pytest.fixture
def images(files, tmp_path):  # noqa: F811
    """Four files, the third of them broken; in the order in which they are read."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, source in {"a": "a", "b": "[b]", "c": "broken", "d": "more/a"}.items():
        shutil.copy(files / "images" / f"{source}.png", folder / f"{name}.png")
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The batches that are explained, by (images, methods)."""
    found, whole = [], fastfg.attribute

    def counting(model, images, **options):
        found.append((len(images), list(options.get("methods", ()))))
        return whole(model, images, **options)

    for module in ("fastfg.attribution.attribute", "fastfg.study.comparison"):
        monkeypatch.setattr(importlib.import_module(module), "attribute", counting)
    return found


def command(files, images, name="evaluate"):  # noqa: F811
    more = QUICK if name == "evaluate" else QUICK[-2:]
    return [name, str(images), *model_arguments(files), *more, "--out"]


def tables(folder):
    """The files that a run writes at its end, but for those that name its time or its folder."""
    names = ("scores.parquet", "table.md", "attributions.csv", "errors.csv", "errors.parquet")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.mark.parametrize("name", ["attribute", "evaluate"])
def test_the_same_command_goes_on(files, images, tmp_path, calls, monkeypatch, capsys, name):  # noqa: F811
    arguments = command(files, images, name)
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert len(calls) == 3

    def stop(*_, **__):
        raise KeyboardInterrupt

    module = "fastfg.attribution.attribute" if name == "attribute" else "fastfg.study.comparison"
    with monkeypatch.context() as patch:
        counting = importlib.import_module(module).attribute
        patch.setattr(
            importlib.import_module(module),
            "attribute",
            lambda *a, **o: (stop if len(calls) == 5 else counting)(*a, **o),
        )
        assert main([*arguments, str(tmp_path / "out")]) == 130
    assert "Complete: 3 of 4 images. The same command goes on with the others" in capsys.readouterr().out
    assert len(tables(tmp_path / "out")) >= 3
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert len(calls) == 6  # the last image alone, and the broken file is not tried again
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert len(calls) == 6
    assert f"{len('abcd')} images" in capsys.readouterr().out
    (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert error["path"] == error["key"] == str(images / "c.png")
    assert [row["path"] for row in read_rows(tmp_path / "out" / "errors.csv")] == [error["path"]]


def test_metrics_and_methods_are_added(files, images, tmp_path, monkeypatch):  # noqa: F811
    done, whole = [], study.compare_batch

    def counting(model, batch, **options):
        done.append((tuple(options["scored"]), tuple(options["metrics"])))
        return whole(model, batch, **options)

    monkeypatch.setattr(study, "compare_batch", counting)
    arguments, out = command(files, images), tmp_path / "out"
    assert main([*arguments, str(out)]) == 0
    done.clear()
    more = ["--metrics", "srg", "aopc", "--methods", "random"]
    assert main([*arguments, str(out), *more]) == 0
    assert done == [(("vanilla",), ("aopc",)), (("random",), ("srg", "aopc"))] * 3
    added = pd.read_parquet(out / "scores.parquet")
    assert main([*arguments, str(tmp_path / "whole"), *more]) == 0
    pd.testing.assert_frame_equal(added, pd.read_parquet(tmp_path / "whole" / "scores.parquet"), rtol=1e-4)
    done.clear()
    assert main([*arguments, str(out)]) == 0  # the first command again: its own columns and rows
    assert done == []
    again = pd.read_parquet(out / "scores.parquet")
    assert list(again.columns) == ["path", "key", "variant", "target", "srg"]
    assert again["variant"].tolist() == ["vanilla"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "seed: expected 0, as in the results in {out}, got 1 (other settings need another folder)"),
        (["--batch-size", "2"], "batch_size: expected 1, as in"),
        (["--target", "1"], "target: expected None, as in"),
        (["--layers", "1", "--score", "gradient_x_residual"], "layers: expected None, as in"),
        (["--weights", "{out}/../other.safetensors"], "weights: expected '"),
        (["{out}/../more"], "images: expected ['{out}/images']"),
    ],
)
def test_other_settings_are_refused(files, images, tmp_path, capsys, change, message):  # noqa: F811
    arguments = command(files, images)
    assert main([*arguments, str(tmp_path / "out")]) == 0
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    save_file(import_timm().create_model(NAME, num_classes=4).state_dict(), tmp_path / "other.safetensors")
    shutil.copytree(images, tmp_path / "more")
    capsys.readouterr()
    change = [text.format(out=tmp_path / "out") for text in change]
    if message.startswith("images"):
        arguments, change, message = [arguments[0], *change, *arguments[2:]], [], "images: expected ["
    assert main([*arguments, str(tmp_path / "out"), *change]) == 1
    check_error(capsys, message.format(out=tmp_path / "out"))
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("name", ["attribute", "evaluate"])
def test_of_two_commands_that_start_at_once_the_second_is_refused(files, images, tmp_path, monkeypatch, capsys, name):  # noqa: F811
    out, init, states = tmp_path / "out", Results.__init__, []
    shutil.copytree(images, tmp_path / "more")
    second = command(files, tmp_path / "more", name)

    def state():
        kept = [file for file in out.rglob("*") if file.is_file() and file.name != ".lock"]
        return {file.relative_to(out): (file.stat().st_mtime_ns, file.stat().st_ino) for file in kept}

    def both(self, *given):  # the folder is new to both
        init(self, *given)
        if not states:
            states.append(None)
            assert main([*command(files, images, name), str(out)]) == 0
            states.append(state())
            capsys.readouterr()

    monkeypatch.setattr(Results, "__init__", both)
    assert main([*second, str(out)]) == 1
    check_error(capsys, f"images: expected ['{images}'], as in the results in {out}, got ['{tmp_path}/more']")
    assert state() == states[1]
    assert main([*second, str(out)]) == 1  # nor later
    assert state() == states[1]


def test_maps_that_are_gone_are_made_again(files, images, tmp_path, capsys):  # noqa: F811
    out, arguments = tmp_path / "out", command(files, images, "attribute")
    assert main([*arguments, str(out)]) == 0
    made = {file.name: file.read_bytes() for file in out.glob("0*")}
    gone = next(name for name in sorted(made) if name.endswith(".npy"))
    (out / gone).unlink()
    capsys.readouterr()
    assert main([*arguments, str(out)]) == 0
    assert f"Maps are missing in {out}: 1 batch computed again" in capsys.readouterr().out.replace("\n", " ")
    assert {file.name: file.read_bytes() for file in out.glob("0*")} == made


def test_parts_of_the_images_make_the_whole(files, images, tmp_path, calls):  # noqa: F811
    arguments = command(files, images)
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    for index in (1, 2, 3):
        assert main([*arguments, str(tmp_path / f"part-{index}"), "--shard", f"{index}/3"]) in (0, 1)
    parts = [pd.read_parquet(file) for file in tmp_path.glob("part-*/scores.parquet")]
    assert len(parts) == 2  # the third part has the broken file alone
    joined = pd.concat(parts).sort_values("path", ignore_index=True)
    pd.testing.assert_frame_equal(joined, pd.read_parquet(tmp_path / "whole" / "scores.parquet"), check_exact=True)
    done = len(calls)
    for index in (1, 2, 3):
        shutil.copytree(tmp_path / f"part-{index}" / "shards", tmp_path / "joined" / "shards", dirs_exist_ok=True)
    shutil.copy(tmp_path / "part-1" / "fastfg.json", tmp_path / "joined")
    assert main([*arguments, str(tmp_path / "joined")]) == 0
    assert len(calls) == done
    assert tables(tmp_path / "joined") == tables(tmp_path / "whole")


@pytest.mark.parametrize("name", ["attribute", "evaluate"])
@pytest.mark.parametrize(
    ("size", "said"), [("1", "Part 5 of 5 has no images: there are 4 batches"), ("9", "there is 1 batch")]
)
def test_a_part_without_images(files, images, tmp_path, capsys, name, size, said):  # noqa: F811
    arguments = command(files, images, name)
    arguments[arguments.index("--batch-size") + 1] = size
    assert main([*arguments, str(tmp_path / "out"), "--shard", "5/5"]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "Complete" not in out
    assert "goes on" not in out


def test_a_part_says_what_is_done_and_who_has_the_others(files, images, tmp_path, calls, monkeypatch, capsys):  # noqa: F811
    arguments = [*command(files, images), str(tmp_path / "out"), "--shard", "2/2"]
    comparison = importlib.import_module("fastfg.study.comparison")
    counting = comparison.attribute

    def stop(*given, **options):
        if calls:
            raise KeyboardInterrupt
        return counting(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "attribute", stop)
        assert main(arguments) == 130
    said = capsys.readouterr().out
    assert "Complete: 1 of 2 images of part 2 of 2. The same command goes on with the others" in said
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "Complete: 2 of 2 images of part 2 of 2. The other parts have 2" in said
    assert "goes on" not in said


def test_maps_are_written_whole_or_not_at_all(files, images, tmp_path, monkeypatch):  # noqa: F811
    out, renamed = tmp_path / "out", []
    whole = Path.replace

    def replace(self, target):
        renamed.append(Path(target).name)
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    out.mkdir()
    for name in (".000000-a.npy.0a1b.tmp", ".000001-b.png.0a1b.tmp", ".000002-c.png.0a1b.tmp"):
        (out / name).touch()
    (out / "fastfg.json").write_text("{}")
    assert main([*command(files, images, "attribute"), str(out)]) == 0
    maps = {file.name for file in out.iterdir() if file.suffix in (".npy", ".png")}
    assert len(maps) == 6
    assert maps <= set(renamed)
    assert [file.name for file in out.glob(".*.tmp")] == [".000002-c.png.0a1b.tmp"]  # of an image with no map


def test_a_changed_file_is_computed_again(files, images, tmp_path, calls, capsys):  # noqa: F811
    arguments = [*command(files, images), str(tmp_path / "out")]
    assert main(arguments) == 0
    calls.clear()
    shutil.copy(images / "a.png", images / "c.png")  # the broken one is repaired
    state = (images / "b.png").stat()
    os.utime(images / "b.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert main(arguments) == 0
    assert len(calls) == 2
    assert "Files have changed since an earlier run: 2 of its batches are not used" in capsys.readouterr().out
    assert len(pd.read_parquet(tmp_path / "out" / "scores.parquet")) == 4
    assert not (tmp_path / "out" / "errors.csv").exists()
    assert not (tmp_path / "out" / "errors.parquet").exists()


def test_failed_files_are_tried_again_if_asked(files, images, tmp_path, calls, monkeypatch):  # noqa: F811
    from fastfg.data import folder

    whole = folder.read_image

    def busy(path, **options):
        if path.name == "d.png":
            raise OSError("the disk did not answer")
        return whole(path, **options)

    arguments = [*command(files, images), str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_image", busy)
        assert main(arguments) == 0
    assert len(read_rows(tmp_path / "out" / "errors.csv")) == 2
    assert main(arguments) == 0
    assert len(calls) == 2
    assert main([*arguments, "--retry-failed"]) == 0
    assert len(calls) == 3
    assert [os.path.basename(row["path"]) for row in read_rows(tmp_path / "out" / "errors.csv")] == ["c.png"]  # noqa: PTH119


def test_too_many_failures(files, images, tmp_path, calls, capsys):  # noqa: F811
    arguments = [*command(files, images), str(tmp_path / "out"), "--max-failures"]
    assert main([*arguments, "0.1"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: max_failures: expected at most 0.1 of 4 images to fail, got 1; the first in")
    assert "c.png: OSError: " in shown
    assert len(pd.read_parquet(tmp_path / "out" / "scores.parquet")) == 2
    assert main([*arguments, "0.25"]) == 0
    assert len(calls) == 3


def test_config(files, tmp_path):  # noqa: F811
    image = files / "images" / "a.png"
    assert main([*command(files, image), str(tmp_path), *gate_arguments(files)]) == 0
    assert main([*command(files, image, "attribute"), str(tmp_path)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert sorted(config) == ["attribute", "evaluate"]
    assert config["evaluate"]["arguments"]["metrics"] == ["srg"]
    assert sorted(config["evaluate"]["saes"]) == ["1", "3"]
    assert config["evaluate"]["weights"] == config["attribute"]["weights"]
    assert config["evaluate"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--shard", "0/3"], "argument --shard: expected a part I/N with I from 1 to N, such as 1/4, got '0/3'"),
        (["--shard", "4/3"], "argument --shard: expected a part I/N"),
        (["--max-failures", "1.5"], "argument --max-failures: expected a number from 0 to 1, got '1.5'"),
    ],
)
def test_wrong_options(capsys, option, message):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "a.png", "--model", NAME, "--out", "o", *option])
    assert stopped.value.code == 2
    check_error(capsys, message)


def test_an_sae_with_other_settings_is_another_one(files, images, tmp_path, capsys):  # noqa: F811
    """The same weights with another ``k`` give other maps, so earlier scores are not theirs."""
    saes = tmp_path / "saes"
    shutil.copytree(files / "saes", saes)
    arguments = [*command(files, images), str(tmp_path / "out"), "--saes", str(saes), "--layers", "1", "3"]
    assert main(arguments) == 0
    config = next(saes.glob("*1/config.json"))
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"k": settings["k"] - 1}))
    assert main(arguments) == 1
    check_error(capsys, "saes: expected")
