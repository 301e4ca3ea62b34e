"""Relevancy on its way through the blocks: what happens when a residual's gradient, or an attention's, arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg import ops
from fastfg.attribution.patch_scores import PatchScores
from fastfg.checks import check_width
from fastfg.models import Adapter
from fastfg.reference.relevancy import attend, pooling_row, rollout
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import Attribution, Features, Gate


class RelevancyPass:
    """Relevancy's rows, and what goes into them, while the backward pass goes by.

    :class:`fastfg.attribution.capture.Capture` calls ``on_residual`` and ``on_attention`` from the last block to the first.
    """

    def __init__(
        self,
        adapter: Adapter,
        grid: tuple[int, int],
        configs: Sequence[Gate | None],
        saes: Mapping[int, SparseAutoencoder],
        identity: str,
        backend: str,
        features: int,
        methods: Sequence[str],
    ) -> None:
        self.adapter, self.grid, self.configs, self.saes = adapter, grid, configs, saes
        self.identity, self.backend, self.n_features = identity, backend, features
        self.layers = sorted({layer for config in configs if config is not None for layer in config.layers})
        self.wanted = methods
        self.n_tokens = adapter.num_prefix_tokens + grid[0] * grid[1]
        self.rows: Tensor | None = None  # [C, B, N]
        self.methods: dict[str, Tensor] = {}  # each [B, N], or [B, P] of the pixels
        self.scores: dict[int, Tensor] = {}  # each [C, B, P]
        self.gates: dict[int, Tensor] = {}
        self.features: dict[int, Features] = {}

    def on_residual(self, block: int, x: Tensor, g: Tensor) -> None:
        """The gates of ``block``, from its residual stream and the gradient there, patches only."""
        with torch.autocast(x.device.type, enabled=False):
            if block in self.saes:
                check_width(self.saes[block], x, block)
            first = self.adapter.num_prefix_tokens
            source = PatchScores(x[:, first:], g[:, first:], self.saes.get(block), self.backend)
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

    def on_attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        """One step ``r <- r + (r @ E) * w``, or the start under an attention-pooling head."""
        with torch.autocast(q.device.type, enabled=False):
            if number >= len(self.adapter.blocks):
                if not self.adapter.pooled:
                    self._on_pooling_head(q, k, v, dO, scale)
                return
            if q.shape[2] != self.n_tokens:
                raise RuntimeError(f"model: expected {self.n_tokens} tokens in block {number}, met {q.shape[2]}")
            if self.rows is None:
                self._on_last_block(q, k, scale)
            assert self.rows is not None
            if "rollout" in self.wanted:
                self.methods["rollout"] = rollout(self.methods["rollout"].unsqueeze(0), q, k, scale)[0]
            gates = None
            if number in self.gates:
                gates = torch.ones_like(self.rows)
                gates[..., self.adapter.num_prefix_tokens :] = self.gates[number]
            self.rows = ops.relevancy(self.rows, q, k, v, dO, scale, gates, self.identity, backend=self.backend)

    def _start(self, row: Tensor) -> None:
        """Begin with ``row`` [B, N], the same for every gate."""
        self.rows = row.expand(len(self.configs), -1, -1)

    def _on_last_block(self, q: Tensor, k: Tensor, scale: float) -> None:
        """The first block that is met, where no pooling head was: relevancy starts from the rows that are read."""
        if not self.adapter.pooled:
            raise RuntimeError("model: expected the logits to depend on its attention-pooling head, they do not")
        row = self.adapter.first_row(self.n_tokens, _working_dtype(q), q.device).expand(q.shape[0], -1)
        self._start(row)
        if "rollout" in self.wanted:
            self.methods["rollout"] = row
        if "last_attention" in self.wanted:
            self.methods["last_attention"] = attend(row.unsqueeze(0), q, k, scale)[0]

    def _on_pooling_head(self, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        """An attention-pooling head is met first: relevancy starts from its own row."""
        q, k, v, dO = (t.to(_working_dtype(t)) for t in (q, k, v, dO))
        self._start(self._with_prefix(pooling_row(q, k, v, dO, scale)))
        every_query = q.new_ones(1, q.shape[0], q.shape[2]) / q.shape[2]
        for name in ("rollout", "last_attention"):
            if name in self.wanted:
                self.methods[name] = self._with_prefix(attend(every_query, q, k, scale)[0])

    def _with_prefix(self, row: Tensor) -> Tensor:
        """``row`` [B, P or N] over all tokens: a pooling head may look at the patches alone."""
        return F.pad(row, (self.n_tokens - row.shape[-1], 0))

    def on_input(self, images: Tensor, gradient: Tensor) -> None:
        """Gradient times input, summed over each patch."""
        gh, gw = self.grid
        product = (images * gradient).to(_working_dtype(images)).sum(1)
        if self.adapter.patch_size is not None:  # pixels beyond the last whole patch belong to none
            ph, pw = self.adapter.patch_size
            product = product[:, : gh * ph, : gw * pw]
        patches = product.unflatten(-1, (gw, -1)).unflatten(1, (gh, -1)).sum((2, 4))
        self.methods["gradient_x_input"] = patches.flatten(1)

    def result(self, target: Tensor, logits: Tensor, single: bool) -> Attribution:
        """What was asked for; ``single``: without the leading dimension of configurations."""
        assert self.rows is not None  # Capture.backward met every block
        P = self.grid[0] * self.grid[1]

        def pick(t: Tensor) -> Tensor:
            return t[0] if single else t

        return Attribution(
            maps=pick(self.rows[..., -P:].unflatten(-1, self.grid)).contiguous(),
            target=target,
            logits=logits,
            scores={block: pick(t) for block, t in sorted(self.scores.items())},
            gates={block: pick(t) for block, t in sorted(self.gates.items())},
            features={block: Features(*map(pick, t)) for block, t in sorted(self.features.items())},
            methods={name: t[..., -P:].unflatten(-1, self.grid).contiguous() for name, t in self.methods.items()},
        )


def _working_dtype(t: Tensor) -> torch.dtype:
    """Relevancy is kept in float32, or in float64 for a float64 model."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _no_features(like: Tensor, n: int) -> Features:
    indices = torch.full((*like.shape, n), -1, dtype=torch.int64, device=like.device)
    return Features(indices, torch.zeros(indices.shape, dtype=like.dtype, device=like.device))
