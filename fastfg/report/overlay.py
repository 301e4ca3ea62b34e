"""Draw a heatmap over its image and save it as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastfg.files import whole

COLOURS = "inferno"
STRENGTH = 0.6  # opacity of the heatmap where it is 1


def displayed(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """A model's input [C, H, W], with 1 or 3 channels, as a picture [H, W, 3] in 0..1.

    Args:
        mean, std: the model's normalisation, one value per channel. If one of them is None, the picture is stretched
            to 0..1 instead.
    """
    picture = image.detach().float().cpu()
    if mean is not None and std is not None:
        picture = picture * torch.tensor(std).reshape(-1, 1, 1) + torch.tensor(mean).reshape(-1, 1, 1)
    else:
        picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-12)
    return picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)


def save_overlay(path: Path, picture: Tensor, heat: Tensor) -> None:
    """Write ``heat`` [H, W] in 0..1 over ``picture`` [H, W, 3] to ``path``, whole or not at all.

    The format is that of the path's suffix, or PNG. Raises ValueError for a heatmap with NaN or infinite values.
    """
    import matplotlib
    from PIL import Image

    if not bool(heat.isfinite().all()):
        raise ValueError("heat: expected finite values, got NaN or infinity")
    colours = torch.from_numpy(matplotlib.colormaps[COLOURS](heat.cpu().numpy())[..., :3])
    weight = (STRENGTH * heat.cpu().double()).unsqueeze(-1)
    mixed = (1 - weight) * picture.double() + weight * colours
    drawn = Image.fromarray((mixed * 255).round().to(torch.uint8).numpy())
    with whole(Path(path)) as hidden:
        drawn.save(hidden, Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"))
