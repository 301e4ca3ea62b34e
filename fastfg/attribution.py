"""The method: one forward, one backward, and the maps of any number of gates.

``r <- r + (r @ E_l) * w_l`` from the last block to the first is the order in which the backward pass visits the
blocks, so the attribution is finished when the backward pass is. No block's attention map is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastfg import ops
from fastfg.capture import Capture
from fastfg.checks import Target, check_gates, check_images, check_saes, check_width, resolve_target
from fastfg.models import Adapter, adapt
from fastfg.models.hold import hold
from fastfg.reference.relevancy import IDENTITIES
from fastfg.sae.model import SparseAutoencoder
from fastfg.score import LayerScores
from fastfg.types import Attribution, Features, Gate


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

    Returns an :class:`Attribution`. Raises ValueError or TypeError that names the argument, and RuntimeError
    where the model's attention was not met once a block.

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.attribute(model, torch.randn(2, 3, 32, 32)).maps.shape
    torch.Size([2, 2, 2])
    """
    adapter = adapt(model)
    configs = list(gate) if isinstance(gate, Sequence) else [gate]
    _check(adapter, images, saes, configs, identity, features)
    grid = adapter.grid((images.shape[-2], images.shape[-1]))
    stream = _Stream(adapter, configs, saes or {}, identity, backend, features)
    capture = Capture(adapter.blocks, stream.layers, stream.on_residual, stream.on_attention)
    with hold(adapter.model, adapter.flags), torch.inference_mode(False), torch.enable_grad(), capture:
        logits = adapter.model(images.detach())
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model: expected logits [B, n] from model(images), got {got}")
        chosen = resolve_target(target, logits)
        capture.backward(logits.gather(1, chosen[:, None]).sum())
    return stream.result(chosen, logits.detach(), grid, single=not isinstance(gate, Sequence))


def _check(
    adapter: Adapter,
    images: Tensor,
    saes: Mapping[int, SparseAutoencoder] | None,
    configs: list[Gate | None],
    identity: str,
    features: int,
) -> None:
    parameter = adapter.parameter
    check_images(images, adapter.in_chans, parameter.dtype)
    if images.device != parameter.device:
        raise ValueError(f"images: expected them on {parameter.device}, as the model is, got {images.device}")
    if not configs:
        raise ValueError("gate: expected a Gate, None or a list with at least one of them, got an empty list")
    check_gates(configs, adapter)
    need = sorted({layer for c in configs if c is not None and (c.needs_sae or features) for layer in c.layers})
    check_saes(saes, need, parameter.device)
    if identity not in IDENTITIES:
        raise ValueError(f"identity: expected one of {IDENTITIES}, got {identity!r}")
    if features < 0:
        raise ValueError(f"features: expected a number >= 0, got {features}")


class _Stream:
    """The state of one attribution while the backward pass goes by."""

    def __init__(
        self,
        adapter: Adapter,
        configs: list[Gate | None],
        saes: Mapping[int, SparseAutoencoder],
        identity: str,
        backend: str,
        features: int,
    ) -> None:
        self.adapter, self.configs, self.saes = adapter, configs, saes
        self.identity, self.backend, self.n_features = identity, backend, features
        self.layers = sorted({layer for config in configs if config is not None for layer in config.layers})
        self.rows: Tensor | None = None  # [C, B, N]
        self.scores: dict[int, Tensor] = {}  # each [C, B, P]
        self.gates: dict[int, Tensor] = {}
        self.features: dict[int, Features] = {}

    def on_residual(self, block: int, x: Tensor, g: Tensor) -> None:
        """The gates of ``block``, from its residual stream and the gradient there, patches only."""
        with torch.autocast(x.device.type, enabled=False):
            if block in self.saes:
                check_width(self.saes[block], x, block)
            first = self.adapter.num_prefix_tokens
            source = LayerScores(x[:, first:], g[:, first:], self.saes.get(block), self.backend)
            dtype = _working_dtype(x)
            shape = source.shape
            none, ones = torch.full(shape, torch.nan).to(x.device, dtype), torch.ones(shape).to(x.device, dtype)
            scores, gates, features = [], [], []
            known: dict[tuple[str, int | None, bool], Tensor] = {}
            for config in self.configs:
                if config is None or block not in config.layers:
                    scores.append(none)
                    gates.append(ones)
                    features.append(_no_features(ones, self.n_features))
                    continue
                kind = (config.score, config.shuffle_seed, config.rescale)
                if kind not in known:
                    known[kind] = source.score(config).to(dtype)
                scores.append(known[kind])
                gates.append(ops.gate(known[kind], config.kappa, config.c_max, backend=self.backend))
                if self.n_features:
                    features.append(source.features(config, self.n_features))
            self.scores[block], self.gates[block] = torch.stack(scores), torch.stack(gates)
            if self.n_features:
                self.features[block] = Features(*(torch.stack(part) for part in zip(*features, strict=True)))

    def on_attention(self, block: int, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        """One step ``r <- r + (r @ E) * w``."""
        with torch.autocast(q.device.type, enabled=False):
            dtype = _working_dtype(q)
            q, k, v, dO = (t.to(dtype) for t in (q, k, v, dO))
            B, N = q.shape[0], q.shape[2]
            if self.rows is None:
                self.rows = self.adapter.first_row(N, q).expand(len(self.configs), B, N)
            gates = None
            if block in self.gates:
                gates = torch.ones_like(self.rows)
                gates[..., self.adapter.num_prefix_tokens :] = self.gates[block]
            self.rows = ops.relevancy(self.rows, q, k, v, dO, scale, gates, self.identity, backend=self.backend)

    def result(self, target: Tensor, logits: Tensor, grid: tuple[int, int], single: bool) -> Attribution:
        assert self.rows is not None  # Capture.backward met every block
        patches = self.rows[..., self.adapter.num_prefix_tokens :]
        if patches.shape[-1] != grid[0] * grid[1]:
            raise RuntimeError(f"model: expected {grid[0]} x {grid[1]} patch tokens, met {patches.shape[-1]}")

        def pick(t: Tensor) -> Tensor:
            return t[0] if single else t

        return Attribution(
            maps=pick(patches.unflatten(-1, grid)).contiguous(),
            target=target,
            logits=logits,
            scores={block: pick(t) for block, t in sorted(self.scores.items())},
            gates={block: pick(t) for block, t in sorted(self.gates.items())},
            features={block: Features(*map(pick, t)) for block, t in sorted(self.features.items())},
        )


def _working_dtype(t: Tensor) -> torch.dtype:
    """Relevancy is kept in float32, or in float64 for a float64 model."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _no_features(like: Tensor, n: int) -> Features:
    indices = torch.full((*like.shape, n), -1, dtype=torch.int64, device=like.device)
    return Features(indices, torch.zeros(indices.shape, dtype=like.dtype, device=like.device))
