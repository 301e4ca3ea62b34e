"""The examples that ``--help`` shows: every command has one, and each of them runs.

A folder ``photographs``, weights and SAEs stand in for the user's, and timm's smallest ViT for a large one. Examples of
work that takes minutes (``ONLY_PARSED``) go through the parser here; other tests run these commands on small data.
"""

import argparse
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastfg.cli import main, parser
from fastfg.models.timm import import_timm
from fastfg.study.demo.cells import load_cells
from tests.data.test_layouts import covid, kaggle, kvasir, photographs  # noqa: F401 - fixtures
from tests.tools import installed, random_sae

SMALL, WIDTH = "test_vit", 64
BATCH = ["--batch-tokens", "256", "--buffer", "600", "--expansion", "1", "--k", "4", "--held-out", "0.3"]
MORE = {  # options that make the work small
    "evaluate": ["--patches-per-step", "49"],
    "train-sae": BATCH,
}
# {start of an example: the test that runs the command on small data}
ONLY_PARSED = {
    "demo": "tests/study/test_demo_settings.py",
    "study run": "tests/study/test_protocol.py",
    "finetune": "tests/cli/test_data.py",
    "study init elpv": "tests/study/test_config.py",
    "data prepare elpv": "tests/cli/test_data.py",
}
TREES = {  # {layout: (the fixture, what the tree has too few images for)}
    "covid-qu-ex": ("covid", []),
    "hyperkvasir": ("kvasir", []),
    "imagenet": ("kaggle", ["--validation", "3", "--test", "6"]),
    "folder": ("photos", []),
}


def parsers(one):
    """A parser and those of its subcommands."""
    yield one
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def examples(one):
    """The commands that a parser's help shows, without the comments beside them."""
    text = (one.epilog or "").replace("\\\n", " ")
    found = re.findall(r"^  (?:fastfg|torchrun .* -m fastfg) (.*)", text, re.MULTILINE)
    return [re.split(r"(?<=\S)\s{4,}(?![-\s])", line)[0] for line in found]


ALL = sorted({line for one in parsers(parser()) for line in examples(one)})


@pytest.mark.parametrize("name", [one.prog for one in parsers(parser())])
def test_every_help_shows_an_example(name):
    one = next(one for one in parsers(parser()) if one.prog == name)
    own = name.removeprefix("fastfg").strip()
    assert any(line.startswith(own) for line in examples(one))
    assert "\n  fastfg " in one.format_help()


@pytest.mark.parametrize("line", ALL)
def test_an_example_is_a_right_command_line(line):
    if line.endswith("--help"):
        return
    parser().parse_args(shlex.split(line))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What the examples name: photographs in two classes, weights, and an SAE. ``train-sae`` makes the other SAEs."""
    folder = tmp_path_factory.mktemp("stand-ins")
    random = np.random.default_rng(0)
    for i in range(14):  # of which two are to validate and two to test with
        file = folder / "photographs" / ("cats", "dogs")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    torch.manual_seed(0)
    state = import_timm().create_model(SMALL, num_classes=2).state_dict()
    save_file(state, folder / "vit.safetensors")
    torch.save(state, folder / "w.pt")
    random_sae(WIDTH, 128, "topk", k=8, dtype=torch.float32).save(folder / "downloaded")
    return folder


def small(line):
    words = [SMALL if word.startswith("vit_") else word for word in shlex.split(line)]
    return words + MORE.get(words[0], [])


RUN = [line for line in ALL if not line.startswith((*ONLY_PARSED, "data prepare")) and not line.endswith("--help")]


def order(line):
    """The gates use what ``train-sae`` has trained, and ``report`` reads what ``evaluate`` has written."""
    return {"train-sae": 0, "report": 2}.get(line.split()[0], 1)


def test_the_examples_run(stand_ins, monkeypatch, capsys):
    monkeypatch.chdir(stand_ins)
    for line in sorted(RUN, key=order):
        code = main(small(line))
        said = capsys.readouterr()
        assert code == 0, f"fastfg {line}: {said.err}"


@pytest.mark.parametrize("layout", TREES)
def test_the_examples_of_layouts_run(layout, request, stand_ins, tmp_path, monkeypatch, capsys):
    installed(load_cells)
    fixture, more = TREES[layout]
    source = stand_ins / "photographs" if fixture == "photos" else request.getfixturevalue(fixture)
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in ALL if line.startswith(f"data prepare {layout} ")]
    words = shlex.split(line)
    words[3] = str(source / "archive" if (source / "archive").is_dir() else source)
    assert main([*words, *more]) == 0, capsys.readouterr().err
    assert (tmp_path / words[4] / "manifest.parquet").is_file()
