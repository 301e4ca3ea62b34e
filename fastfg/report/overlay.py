"""A heatmap over its photograph, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

COLOURS = "inferno"
STRENGTH = 0.6  # of the heatmap over the photograph


def displayed(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """A model's input [C, H, W] back as a picture [H, W, 3] in 0..1.

    Without its normalisation the picture is stretched to fill 0..1.
    """
    picture = image.detach().float().cpu()
    if mean is not None and std is not None:
        picture = picture * torch.tensor(std).reshape(-1, 1, 1) + torch.tensor(mean).reshape(-1, 1, 1)
    else:
        picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-12)
    return picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)


def save_overlay(path: Path, picture: Tensor, heat: Tensor) -> None:
    """Write ``heat`` [H, W] in 0..1 over ``picture`` [H, W, 3] to ``path``."""
    import matplotlib
    from PIL import Image

    colours = torch.from_numpy(matplotlib.colormaps[COLOURS](heat.cpu().numpy())[..., :3])
    weight = (STRENGTH * heat.cpu().double()).unsqueeze(-1)
    mixed = (1 - weight) * picture.double() + weight * colours
    Image.fromarray((mixed * 255).round().to(torch.uint8).numpy()).save(path)
