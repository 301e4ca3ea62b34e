"""Carry relevancy from the last block to the first, one step per attention that the backward pass reaches."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg import ops
from fastfg.attribution.patch_scores import PatchScores, shuffled
from fastfg.attribution.sae_report import warn_of_poor_fit
from fastfg.models import Adapter
from fastfg.reference.relevancy import pooling_row
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import Features, Gate

log = logging.getLogger("fastfg")

# On an H200, one launch took 0.73 ms for 64 x 196 patches and the separate ops 0.55 ms, but for one image 0.08 ms and
# 0.43 ms, most of it the host's. Where the host decides, which it does up to about 64 images, one launch is better.
PATCHES_IN_ONE_LAUNCH = 64 * 196


class RelevancyPass:
    """The relevancy rows, and the scores and gates that they were made with.

    :class:`fastfg.attribution.capture.Capture` calls ``on_residual`` and ``on_attention`` for each block.

    Args:
        adapter: the model. n_tokens: ``N``. configs: the ``C`` gates; None is no gate.
        saes: {block: SAE} for each of them, or for the first ones. identity, backend, features: as in
            :func:`fastfg.attribute`.

    Attributes:
        rows: [C, B, N]. After the backward pass they hold the maps; before it they are None.
        scores, gates: {block: [C, B, P]}. features: {block: Features}, if ``features > 0``.
    """

    def __init__(
        self,
        adapter: Adapter,
        n_tokens: int,
        configs: Sequence[Gate | None],
        saes: Sequence[Mapping[int, SparseAutoencoder] | None],
        identity: str,
        backend: str,
        features: int,
    ) -> None:
        self.adapter, self.n_tokens, self.configs = adapter, n_tokens, configs
        self._saes: list[Mapping[int, SparseAutoencoder]] = []  # the different ones
        self._which = [self._place(own or {}) for own in saes]
        self._which += [0] * (len(configs) - len(saes))
        self.identity, self.backend, self.n_features = identity, backend, features
        self.layers = sorted({layer for config in configs if config is not None for layer in config.layers})
        self.rows: Tensor | None = None
        self.scores: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}
        self.features: dict[int, Features] = {}
        self._sources: dict[int, dict[int, PatchScores]] = {}  # for the gated block whose attention comes next
        last = len(adapter.blocks) - 1
        if adapter.n_rows is not None and any(
            c is not None and last in c.layers and c.score != "activation" for c in configs
        ):
            _warn_of_no_gradient(last)

    def on_residual(self, block: int, x: Tensor, g: Tensor) -> None:
        """Keep a gated block's residual stream and its gradient, both [B, N, d]. The block's attention comes next."""
        if block not in self.layers:
            return
        first = self.adapter.num_prefix_tokens
        sources = self._sources[block] = {}
        for which, gates in self._by_saes(block).items():
            needed = self.n_features or any(gate.needs_sae for gate in gates)
            sae = self._saes[which][block] if needed else None
            if sae is not None:
                warn_of_poor_fit(sae, x[:, first:], block)
            sources[which] = PatchScores(x[:, first:], g[:, first:], sae, self.backend)

    def on_attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        """Do one step ``r <- r + (r @ E) * w``, or start at an attention-pooling head."""
        if number >= len(self.adapter.blocks):
            if not self.adapter.pooled:
                self.rows = self._start_at_pooling_head(q, k, v, dO, scale)
            return
        rows = self._start_at_last_block(q) if self.rows is None else self.rows
        sources = self._sources.pop(number, None)
        if sources is None:
            self.rows = ops.relevancy(rows, q, k, v, dO, scale, None, self.identity, backend=self.backend)
        elif self._in_one_launch(number, sources, rows):
            (source,) = sources.values()
            self.rows = self._gated_step(number, source, rows, q, k, v, dO, scale)
        else:
            gates = torch.ones_like(rows)
            gates[..., self.adapter.num_prefix_tokens :] = self._gate(number, sources, rows.dtype)
            self.rows = ops.relevancy(rows, q, k, v, dO, scale, gates, self.identity, backend=self.backend)

    def overflowed(self, is_nan: Tensor) -> Tensor:
        """Which images have rows that are not finite although their target is no NaN: [B]."""
        assert self.rows is not None  # Capture.backward reached every block
        return ~self.rows.isfinite().all(-1).all(0) & ~is_nan

    def mark_missing(self, is_nan: Tensor) -> None:
        """Make the rows NaN of images whose target is undefined, and warn of all rows that are not finite. Waits once.

        Args:
            is_nan: [B], whether the target is.
        """
        overflowed = self.overflowed(is_nan)
        if not bool((overflowed | is_nan).any()):
            return
        assert self.rows is not None
        self.rows = self.rows.masked_fill(is_nan[:, None], torch.nan)
        for which, why in ((is_nan, "the model's output is NaN"), (overflowed, "numbers became too large")):
            if images := which.nonzero().flatten().tolist():
                log.warning("no map for image(s) %s of this batch, but NaN or infinity: %s", images[:8], why)

    # Where relevancy starts ----------------------------------------------------------------------------------

    def _start_at_last_block(self, q: Tensor) -> Tensor:
        """The rows that the head reads, the same for every gate."""
        if not self.adapter.pooled:
            raise RuntimeError("model: expected the logits to depend on its attention-pooling head, but they do not")
        row = self.adapter.first_row(self.n_tokens, maps_dtype(self.adapter, q.dtype), q.device).expand(q.shape[0], -1)
        return row.expand(len(self.configs), -1, -1)

    def _start_at_pooling_head(self, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> Tensor:
        """The head's own row, the same for every gate. The head may read only the patches."""
        q, k, v, dO = (t.to(working_dtype(t)) for t in (q, k, v, dO))
        row = over_all_tokens(pooling_row(q, k, v, dO, scale), self.n_tokens, self.adapter.num_prefix_tokens)
        return row.expand(len(self.configs), -1, -1)

    # A gated block -------------------------------------------------------------------------------------------

    def _gating(self, block: int) -> list[Gate | None]:
        """The configurations, with None for those that do not gate ``block``."""
        return [None if config is None or block not in config.layers else config for config in self.configs]

    def _place(self, saes: Mapping[int, SparseAutoencoder]) -> int:
        """The number of ``saes`` among the different ones."""
        for number, known in enumerate(self._saes):
            if known is saes or known == saes:
                return number
        self._saes.append(saes)
        return len(self._saes) - 1

    def _by_saes(self, block: int) -> dict[int, list[Gate]]:
        """The configurations that gate ``block``, by the number of their SAEs."""
        found: dict[int, list[Gate]] = {}
        for which, config in zip(self._which, self._gating(block), strict=True):
            if config is not None:
                found.setdefault(which, []).append(config)
        return found

    def _gate(self, block: int, sources: Mapping[int, PatchScores], dtype: torch.dtype) -> Tensor:
        """The gates [C, B, P] of ``block`` by the separate ops (eq. 2 to 5). Stores scores, gates and features."""
        one = next(iter(sources.values()))
        none = one.x.new_full(one.shape, torch.nan, dtype=dtype)
        ones = one.x.new_ones(one.shape, dtype=dtype)
        known: dict[tuple[int, str, int | None, bool], Tensor] = {}
        scores, gates, features = [], [], []
        for which, config in zip(self._which, self._gating(block), strict=True):
            if config is None:
                scores.append(none)
                gates.append(ones)
                features.append(_no_features(ones, self.n_features))
                continue
            source, kind = sources[which], (which, config.score, config.shuffle_seed, config.rescale)
            if kind not in known:
                known[kind] = source.score(config).to(dtype)
                if config.score == "gradient_x_residual" and source.is_orthogonal():
                    _warn_of_rounding(block)
            scores.append(known[kind])
            w = ops.gate(known[kind], config.kappa, config.c_max, backend=self.backend)
            if config.permute_seed is not None:
                w = w[:, shuffled(w.shape[1], config.permute_seed, w.device)]
            gates.append(w)
            if self.n_features:
                features.append(source.features(config, self.n_features))
        self.scores[block], self.gates[block] = torch.stack(scores), torch.stack(gates)
        if self.n_features:
            self.features[block] = Features(*(torch.stack(part) for part in zip(*features, strict=True)))
        return self.gates[block]

    def _in_one_launch(self, block: int, sources: Mapping[int, PatchScores], rows: Tensor) -> bool:
        """Whether ``ops.gated_relevancy`` is to compute all gates of ``block``.

        It can on CUDA, for ``combined`` scores of K codes of one SAE, and rows of the model's own precision. For one
        gate and many patches, the separate ops are faster.
        """
        if len(sources) > 1:
            return False
        ((which, source),) = sources.items()
        if rows.dtype != working_dtype(source.x):  # under mean pooling
            return False
        sae = self._saes[which].get(block)
        if not source.x.is_cuda or self.n_features or sae is None or not sae.fixed_k:
            return False
        if len(self.configs) == 1 and math.prod(source.shape) > PATCHES_IN_ONE_LAUNCH:
            return False
        gates = [config for config in self._gating(block) if config is not None]
        plain = all(
            gate.score == "combined" and gate.shuffle_seed is None and gate.permute_seed is None and not gate.rescale
            for gate in gates
        )
        return plain and source.g_scale is None

    def _gated_step(
        self, block: int, source: PatchScores, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float
    ) -> Tensor:
        """The new rows [C, B, N] by one op (eq. 2 to 6). Stores scores and gates."""
        gating = self._gating(block)
        numbers = [(1.0, 1.0) if gate is None else (gate.kappa, gate.c_max) for gate in gating]  # 1: all gates are 1
        kappa, c_max = _on_device(tuple(numbers), rows.dtype, rows.device).unbind(1)
        g, values, indices = (t.unflatten(0, source.shape) for t in (source.g_sae, *source.codes))
        rows, scores, gates = ops.gated_relevancy(
            rows, q, k, v, dO, scale, g, source.sae.W_dec, values, indices, kappa, c_max, self.identity,
            backend=self.backend,
        )  # fmt: skip
        none = torch.full_like(scores, torch.nan)
        self.scores[block] = torch.stack([none if gate is None else scores for gate in gating])
        self.gates[block] = gates
        return rows


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[tuple[float, float], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``numbers`` as a tensor that is not to be changed. A copy to the device waits for it, so it is made once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def maps_dtype(adapter: Adapter, own: torch.dtype) -> torch.dtype:
    """The dtype of maps for a model whose attention has the dtype ``own``: float32, or float64 for a float64 model.

    Mean pooling starts at ``1 / N`` for every token, and small gradients add little to it: their sum is in float64.
    """
    starts_at_patches = bool(adapter.pooled) and adapter.n_rows is None
    return torch.float64 if starts_at_patches or own == torch.float64 else torch.float32


def working_dtype(t: Tensor) -> torch.dtype:
    """Relevancy is kept in float32, or in float64 for a float64 model."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def over_all_tokens(row: Tensor, n_tokens: int, n_prefix: int) -> Tensor:
    """A pooling head's row over its keys, all tokens or only the patches, as a row over all tokens [B, N]."""
    keys = row.shape[-1]
    if keys not in (n_tokens, n_tokens - n_prefix):
        raise RuntimeError(
            f"model: expected its attention-pooling head to read all {n_tokens} tokens or the {n_tokens - n_prefix} "
            f"patches, met {keys} keys"
        )
    return F.pad(row, (n_tokens - keys, 0))


def _no_features(like: Tensor, n: int) -> Features:
    indices = torch.full((*like.shape, n), -1, dtype=torch.int64, device=like.device)
    return Features(indices, torch.zeros(indices.shape, dtype=like.dtype, device=like.device))


@functools.cache
def _warn_of_no_gradient(block: int) -> None:
    """Said once per block."""
    log.warning(
        "all gates of block %d are 1: it is the last one, and the head reads no patches of its output, so their "
        "gradient is 0. Gate an earlier block",
        block,
    )


@functools.cache
def _warn_of_rounding(block: int) -> None:
    """Said once per block."""
    log.warning(
        "the score gradient_x_residual is 0 up to rounding at block %d: the gradient is orthogonal to the residual, as "
        "where tokens are read only through a LayerNorm. Its gate is noise: gate an earlier block",
        block,
    )
