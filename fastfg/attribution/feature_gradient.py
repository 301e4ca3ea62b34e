"""Feature-Gradient Attribution as a class with Captum's interface, which also works as Quantus's ``explain_func``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastfg.attribution.attribute import attribute
from fastfg.models import Adapter, adapt
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import Gate

INTERPOLATIONS = ("nearest", "bilinear")


class FeatureGradient:
    """Feature-Gradient Attribution as an attribution method: ``attribute(inputs, target=...)``.

    Args:
        model, saes, gate: as in :func:`fastfg.attribute`. options: its other arguments, used in every call.
        interpolation: ``nearest`` gives each pixel the value of its patch, so that masks cover whole patches;
            ``bilinear`` interpolates between patches. Pixels beyond the last whole patch become 0 with ``nearest``,
            and continue the value at its edge with ``bilinear``.

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.FeatureGradient(model).attribute(torch.randn(2, 3, 32, 32), target=1).shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        model: nn.Module | Adapter,
        saes: Mapping[int, SparseAutoencoder] | None = None,
        gate: Gate | None = None,
        interpolation: str = "nearest",
        **options: Any,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {INTERPOLATIONS}, got {interpolation!r}")
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate: expected one fastfg.Gate or None, got {type(gate).__name__}")
        self.model, self.saes, self.gate = model, saes, gate
        self.interpolation, self.options = interpolation, options

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        """Relevancy per pixel: ``inputs`` [B, C, H, W] -> [B, 1, H, W], not normalised.

        ``target``: as in :func:`fastfg.attribute`; a tensor [B, 1] is read as [B].
        """
        if isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1:
            target = target[:, 0]
        adapter = adapt(self.model)
        result = attribute(adapter, inputs, saes=self.saes, gate=self.gate, target=target, **self.options)
        align = {"align_corners": False} if self.interpolation == "bilinear" else {}
        H, W = inputs.shape[-2:]
        (gh, gw), (ph, pw) = result.maps.shape[-2:], adapter.patch_size or (0, 0)
        h, w = (gh * ph, gw * pw) if adapter.patch_size else (H, W)  # the pixels that belong to a patch
        pixels = F.interpolate(result.maps.unsqueeze(1), size=(h, w), mode=self.interpolation, **align)
        if (h, w) == (H, W):
            return pixels
        return F.pad(pixels, (0, W - w, 0, H - h), mode="constant" if self.interpolation == "nearest" else "replicate")
