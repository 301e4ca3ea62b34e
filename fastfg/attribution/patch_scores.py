"""Scores of the patches of one block. Every kind of score comes from one run of the SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg import ops
from fastfg.attribution.gradient_scale import power_of_two
from fastfg.reference.encode import Normalized, encode, widened
from fastfg.reference.encode_topk import topk_lowest_index
from fastfg.reference.gate import z_score as z_score  # for whoever shows the steps of a gate
from fastfg.sae.model import SparseAutoencoder
from fastfg.types import Features, Gate

FEATURES_AT_ONCE = 4096  # for scores that need the whole dictionary
TOKENS_AT_ONCE = 1024  # for dense codes
FLOAT16_EXPONENT = -7  # of the largest gradient that meets a float16 SAE: room for sums above, for small ones below


def shuffled(n: int, seed: int, device: torch.device) -> Tensor:
    """The permutation of a shuffled decoder or of permuted patches, drawn on the CPU: every device gets the same."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(n, generator=generator, device="cpu").to(device)


class PatchScores:
    """Scores of the patches of one block, for any number of gates. The SAE runs once, on first use.

    Args:
        x: [B, P, d], the residual stream at the patches. g: [B, P, d], the gradient of the target there.
        sae: the block's SAE. It may be None if all gates use ``gradient_x_residual``.
        backend: the backend of the ops.
    """

    def __init__(self, x: Tensor, g: Tensor, sae: SparseAutoencoder | None, backend: str = "auto") -> None:
        self.shape = x.shape[:2]
        self.x, self.g, self.backend = x.flatten(0, 1), g.flatten(0, 1), backend
        self._sae = sae
        self._projected: dict[int | None, tuple[Tensor, Tensor]] = {}

    def score(self, gate: Gate) -> Tensor:
        """The scores [B, P] for ``gate``."""
        scores = BY_KIND[gate.score](self, gate)
        if gate.rescale:
            scores = scores * self.normalized.scale.squeeze(-1)
        return scores.reshape(self.shape)

    def is_orthogonal(self) -> bool:
        """Whether ``g . x`` is 0 up to rounding at every patch: compared with ``|g| |x|``."""
        eps = torch.finfo(self.x.dtype).eps
        largest = (self.g.norm(dim=-1) * self.x.norm(dim=-1)).amax()
        return bool(self.g_dot_x.abs().amax() <= max(1e-4, min(1e3 * eps, 1e-2)) * largest)

    def features(self, gate: Gate, n: int) -> Features:
        """The ``n`` features of each patch that contribute most to eq. 3, by absolute value: [B, P, n]."""
        parts = [_strongest(n, *terms) for terms in self._terms(gate)]
        indices, values = (torch.cat(part).reshape(*self.shape, n) for part in zip(*parts, strict=True))
        return Features(indices, self.at_own_scale(values.flatten(0, 1)).reshape(values.shape))

    # Inputs of the scores ------------------------------------------------------------------------------------

    @property
    def sae(self) -> SparseAutoencoder:
        assert self._sae is not None  # checked with the arguments
        return self._sae

    @cached_property
    def normalized(self) -> Normalized:
        return self.sae.normalize(self.x)

    @cached_property
    def g_dot_x(self) -> Tensor:
        return (widened(self.g) * widened(self.x)).sum(-1)

    @cached_property
    def g_sae(self) -> Tensor:
        """``g`` in the decoder's dtype, multiplied by ``g_scale``."""
        g = self.g if self.g_scale is None else widened(self.g) * self.g_scale[:, None]
        return g.to(self.sae.W_dec.dtype)

    @cached_property
    def g_scale(self) -> Tensor | None:
        """Per token, the power of two that brings its gradient into the range of float16; None: not needed."""
        if self.sae.W_dec.dtype != torch.float16:
            return None
        return power_of_two(widened(self.g).abs().amax(1), FLOAT16_EXPONENT)

    def at_own_scale(self, values: Tensor) -> Tensor:
        """What was computed from ``g_sae``, [T] or [T, n], as if from ``g``."""
        if self.g_scale is None:
            return values
        return widened(values) / self.g_scale.reshape(-1, *[1] * (values.ndim - 1))

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor]:
        """Values and indices [T, K] of an SAE with the same number of codes for every token."""
        sae = self.sae
        assert sae.k is not None
        variant: dict[str, Any] = {
            "post": sae.post,
            "ranking": sae.ranking,
            "groups": sae.activation_name == "groupmax",
        }
        weights = (sae.W_enc, sae.b_enc, sae.subtracted)
        return ops.encode_topk(self.normalized.values, *weights, sae.k, **variant, backend=self.backend)

    @cached_property
    def centred(self) -> Tensor:
        """The encoder's input, after ``b_dec`` is subtracted if the SAE subtracts it."""
        values = self.normalized.values
        return values if self.sae.subtracted is None else values - self.sae.subtracted

    def _decoder_rows(self, gate: Gate, indices: Tensor) -> Tensor:
        """The decoder row of each feature. In a shuffled decoder, this is the row of another feature."""
        if gate.shuffle_seed is None:
            return indices
        return shuffled(self.sae.n_features, gate.shuffle_seed, indices.device)[indices]

    def _project_codes(self, gate: Gate) -> tuple[Tensor, Tensor]:
        """Scores [T] and contributions [T, K] of a TopK SAE's codes, at the scale of ``g_sae``, once per decoder."""
        seed = gate.shuffle_seed
        if seed not in self._projected:
            self._projected[seed] = self._project(gate, self.g_sae, *self.codes)
        return self._projected[seed]

    def _project(self, gate: Gate, g: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and contributions, both at the scale of ``g_sae``."""
        return ops.project(g, self.sae.W_dec, values, self._decoder_rows(gate, indices), backend=self.backend)

    # The score kinds -----------------------------------------------------------------------------------------

    def _combined(self, gate: Gate) -> Tensor:
        if self.sae.fixed_k:
            return self.at_own_scale(self._project_codes(gate)[0])
        sae, W_dec = self.sae, self.sae.W_dec
        if gate.shuffle_seed is not None:
            W_dec = W_dec[shuffled(sae.n_features, gate.shuffle_seed, W_dec.device)]
        scores = ops.encode_project(
            self.centred, self.g_sae, sae.W_enc, sae.b_enc, W_dec, sae.activation, backend=self.backend
        )
        return self.at_own_scale(scores)

    def _activation(self, gate: Gate) -> Tensor:
        if self.sae.fixed_k:
            return widened(self.codes[0]).abs().sum(-1)
        return torch.cat([f.sum(-1, dtype=widened(f[:0]).dtype) for f in self._dense_codes()])

    def _gradient(self, gate: Gate) -> Tensor:
        parts = self.sae.W_dec.split(FEATURES_AT_ONCE)
        return self.at_own_scale(torch.stack([widened(self.g_sae @ W.mT).abs().sum(-1) for W in parts]).sum(0))

    def _gradient_signed(self, gate: Gate) -> Tensor:
        return self.at_own_scale(widened(self.g_sae) @ widened(self.sae.W_dec).sum(0))

    def _gradient_x_residual(self, gate: Gate) -> Tensor:
        return self.g_dot_x

    def _sae_error(self, gate: Gate) -> Tensor:
        left_out = widened(self.x) - widened(self._reconstructed())
        return (widened(self.g) * left_out).sum(-1)

    def _reconstructed(self) -> Tensor:
        """``x_hat`` [T, d] at the scale of the residual stream. No array [T, F] or [T, K, d] is stored."""
        sae, like = self.sae, self.normalized
        if sae.fixed_k:
            values, indices = self.codes
            decoded = F.embedding_bag(indices, sae.W_dec, mode="sum", per_sample_weights=values.to(sae.W_dec.dtype))
        else:
            decoded = torch.cat([f @ sae.W_dec for f in self._dense_codes()])
        return (decoded + sae.b_dec) * like.scale + like.shift

    # Features ------------------------------------------------------------------------------------------------

    def _dense_codes(self) -> Iterator[Tensor]:
        """Codes [T, F], in chunks of TOKENS_AT_ONCE tokens."""
        sae = self.sae
        for x in self.centred.split(TOKENS_AT_ONCE):
            yield encode(x, sae.W_enc, sae.b_enc, None, sae.activation)

    def _terms(self, gate: Gate) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Terms of eq. 3, values and indices of the active features, each [T, K], in chunks of tokens."""
        if self.sae.fixed_k:
            yield self._project_codes(gate)[1], *self.codes
            return
        for g, f in zip(self.g_sae.split(TOKENS_AT_ONCE), self._dense_codes(), strict=True):
            values, indices = topk_lowest_index(f, max(int((f > 0).sum(-1).max()), 1))
            yield self._project(gate, g, values, indices)[1], values, indices


BY_KIND: dict[str, Callable[[PatchScores, Gate], Tensor]] = {
    "combined": PatchScores._combined,
    "activation": PatchScores._activation,
    "gradient": PatchScores._gradient,
    "gradient_signed": PatchScores._gradient_signed,
    "gradient_x_residual": PatchScores._gradient_x_residual,
    "sae_error": PatchScores._sae_error,
}


def _strongest(n: int, terms: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and terms [T, n] of the ``n`` largest terms by absolute value, padded with index -1 and value 0."""
    _, order = topk_lowest_index(terms.abs(), min(n, terms.shape[-1]))
    active = values.gather(-1, order) != 0
    strongest = torch.where(active, terms.gather(-1, order), 0.0)
    chosen = torch.where(active, indices.gather(-1, order), -1)
    short = n - order.shape[-1]
    return F.pad(chosen, (0, short), value=-1), F.pad(strongest, (0, short))
