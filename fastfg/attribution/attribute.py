"""The method: one forward, one backward, and the maps of any number of gates.

``r <- r + (r @ E_l) * w_l`` from the last block to the first is the order in which the backward pass visits the
blocks, so the attribution is finished when the backward pass is. No block's attention map is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastfg.attribution.capture import Capture
from fastfg.attribution.relevancy_pass import RelevancyPass
from fastfg.checks import check_gates, check_images, check_saes, check_target
from fastfg.models import Adapter, adapt
from fastfg.models.hold import hold
from fastfg.reference.relevancy import IDENTITIES
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import Target, resolve_target
from fastfg.types import METHODS, Attribution, Gate


def attribute(
    model: nn.Module | Adapter,
    images: Tensor,
    *,
    saes: Mapping[int, SparseAutoencoder] | None = None,
    gate: Gate | Sequence[Gate | None] | None = None,
    target: Target = None,
    identity: str = "transmm",
    backend: str = "auto",
    features: int = 0,
    methods: Sequence[str] = (),
) -> Attribution:
    """Feature-Gradient Attribution maps of ``images`` (Šula), or TransMM's (Chefer et al.) without a gate.

    Args:
        model: a Vision Transformer of a known family (see :mod:`fastfg.models`); left as it was found.
        images: [B, C, H, W], preprocessed as the model wants them, in the model's dtype and on its device.
        saes: {block: SparseAutoencoder}, one for each gated block; none for ``gradient_x_residual``.
        gate: a :class:`Gate`, None for vanilla TransMM, or a list of them: all from one forward and backward.
        target: the class to explain: None (the predicted one), an int, or one an image.
        identity: ``transmm`` (default) has no identity inside ``E``; ``paper`` reads eq. 1 by the letter.
        backend: ``auto``, or the one that must serve every op (see ``fastfg info``).
        features: how many of each patch's strongest feature contributions to return, per gated block.
        methods: other ways of explaining to return beside the maps: ``rollout`` (attention rollout),
            ``last_attention`` (the raw attention of the last block, or of the pooling head, heads averaged) and
            ``gradient_x_input`` (summed over each patch; the backward pass then goes down to the pixels).

    Returns an :class:`Attribution`. Raises ValueError or TypeError that names the argument, and RuntimeError
    where the model's attention was not met once a block.

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.attribute(model, torch.randn(2, 3, 32, 32)).maps.shape
    torch.Size([2, 2, 2])
    """
    adapter = adapt(model)
    check_target(adapter, target)
    configs = list(gate) if isinstance(gate, Sequence) else [gate]
    _check(adapter, images, saes, configs, identity, features, methods)
    grid = adapter.grid((images.shape[-2], images.shape[-1]))
    relevancy = RelevancyPass(adapter, grid, configs, saes or {}, identity, backend, features, methods)
    with hold(adapter.model, adapter.flags), torch.inference_mode(False), torch.enable_grad():
        root = images.detach().clone().requires_grad_() if "gradient_x_input" in methods else None
        with Capture(adapter, relevancy.layers, relevancy.on_residual, relevancy.on_attention, root) as capture:
            chosen, logits = _run(adapter, images.detach() if root is None else root, target, capture, relevancy)
    return relevancy.result(chosen, logits, single=not isinstance(gate, Sequence))


def _run(
    adapter: Adapter, images: Tensor, target: Target, capture: Capture, relevancy: RelevancyPass
) -> tuple[Tensor, Tensor]:
    """The forward and the backward pass; the targets and the logits."""
    logits = adapter.forward(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits [B, n] from model(images), got {got}")
    chosen = resolve_target(target, logits)
    gradient = capture.backward(logits.gather(1, chosen[:, None]).sum())
    if images.requires_grad:
        relevancy.on_input(images.detach(), gradient)
    return chosen, logits.detach()


def _check(
    adapter: Adapter,
    images: Tensor,
    saes: Mapping[int, SparseAutoencoder] | None,
    configs: list[Gate | None],
    identity: str,
    features: int,
    methods: Sequence[str],
) -> None:
    parameter = adapter.parameter
    check_images(images, adapter.in_chans, parameter)
    if not configs:
        raise ValueError("gate: expected a Gate, None or a list with at least one of them, got an empty list")
    check_gates(configs, adapter)
    need = sorted({layer for c in configs if c is not None and (c.needs_sae or features) for layer in c.layers})
    check_saes(saes, need, parameter.device)
    if identity not in IDENTITIES:
        raise ValueError(f"identity: expected one of {IDENTITIES}, got {identity!r}")
    if features < 0:
        raise ValueError(f"features: expected a number >= 0, got {features}")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods: expected names among {METHODS}, got {unknown}")
