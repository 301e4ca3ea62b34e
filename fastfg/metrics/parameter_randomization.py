"""Model parameter randomisation test, MPRT (Adebayo et al. 2018): does the map depend on what the model has learnt?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject, similarity
from fastfg.metrics.faithfulness_correlation import check_correlation
from fastfg.metrics.metric import check_integer, check_positive

ORDERS = ("top_down", "bottom_up")


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterRandomization(ExplanationMetric):
    """Mean correlation between the map and the maps of a copy of the model, whose parts are re-drawn one after another.

    The parts of a Vision Transformer are its head, each block, and its embedding (patches, positions, class token);
    those of another ``nn.Module`` are the modules with parameters of their own. A step re-draws one more part, and the
    last step has re-drawn all. A module with ``reset_parameters`` is reset by it, and the values of all other
    parameters are permuted. The draws depend on the seed alone, so every image meets the same models. The user's model
    is never changed; memory holds one copy.

    With ``n_samples`` above 1 this is the smooth form, sMPRT (Hedström et al. 2024): each map is the mean over Gaussian
    noises on the image, the last of them 0, for the model itself too. All models meet the same noises.

    Details: ``correlation`` [parts], after each step in the order of re-drawing.

    Args:
        order: ``top_down`` (Adebayo et al.: the head first) or ``bottom_up`` (the embedding first, recommended by
            Hedström et al.).
        correlation: ``spearman`` or ``pearson``. absolute: compare absolute values, as Quantus does.
        n_samples: maps that are averaged; 1 is the plain test. Hedström et al. use 50.
        noise: standard deviation of the noise, as a share of the image's range (its largest value minus its smallest).
    """

    name: ClassVar[str] = "parameter_randomization"
    title: ClassVar[str] = "Parameter Randomisation"
    short: ClassVar[str] = "MPRT"
    higher_is_better: ClassVar[bool] = False
    value_range: ClassVar[str] = "-1 to 1"
    cost: ClassVar[str] = "no forwards; parts x n_samples (blocks + 2) attributions per image"
    source: ClassVar[str] = "Adebayo et al. 2018, arXiv 1810.03292; smooth: Hedström et al. 2024, arXiv 2401.06465"
    failings: ClassVar[str] = (
        "A random map has the best score. The correlation is low where maps are noisy (Hedström et al. 2024) and high "
        "where the task or the image itself decides the map (Yona & Greenfeld 2021). Top-down re-drawing keeps the "
        "lower blocks' features, which favours noisy maps (Binder et al. 2023)."
    )
    redraws: ClassVar[bool] = True

    order: str = "top_down"
    correlation: str = "spearman"
    absolute: bool = False
    n_samples: int = 1
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise ValueError(f"{self.name}: expected order in {ORDERS}, got {self.order!r}")
        check_correlation(self.name, self.correlation)
        if self.absolute not in (True, False):
            raise ValueError(f"{self.name}: expected absolute to be True or False, got {self.absolute!r}")
        check_integer(self.name, "n_samples", self.n_samples, 1)
        check_positive(self.name, "noise", self.noise)

    def changes(self, subject: Subject, random: torch.Generator) -> list[Change]:
        """The model as it is first, if its map is an average too; then one more part re-drawn per change."""
        noises = (*range(self.n_samples - 1), None)
        parts = list(range(len(subject.parts)))
        if self.order == "bottom_up":
            parts.reverse()
        steps = [frozenset(parts[: step + 1]) for step in range(len(parts))]
        first = [Change(noises=noises)] if self.n_samples > 1 else []
        return [*first, *(Change(redrawn=step, noises=noises) for step in steps)]

    def noisy(self, image: Tensor, random: torch.Generator) -> Tensor:
        std = self.noise * float(image.max() - image.min())
        return image + (std * torch.randn(image.shape, generator=random, dtype=torch.float64, device="cpu")).to(image)

    def compare(self, maps: Tensor, again: Tensor, changes: Sequence[Change]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.n_samples > 1:
            maps, again = again[:, 0], again[:, 1:]
        if self.absolute:
            maps, again = maps.abs(), again.abs()
        found = similarity(maps, again, self.correlation)
        return found.mean(1), {"correlation": found}
