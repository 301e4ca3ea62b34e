"""One training step of a TopK SAE: a dense encoder product, and everything else from the active features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfg import ops
from fastfg.sae.model import SparseAutoencoder

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's
AUX_COEFFICIENT = 1 / 32  # weight of the auxiliary loss, from Gao et al. 2024


class TopKStep:
    """The weights of a TopK SAE with their Adam moments, and the step that trains them.

    The loss is ``mean_t |x_t - x_hat_t|^2``. With ``k_aux`` it has a second term from Gao et al. 2024 (AuxK), which
    keeps dead features from staying dead: ``mean_t |e_t - e_hat_t|^2 / 32``. Here ``e = x - x_hat`` without a gradient,
    and ``e_hat`` is its reconstruction from the ``k_aux`` dead features with the largest pre-activations, after ReLU
    and without ``b_dec``. A feature is dead if it was active for none of the last ``dead_after`` tokens.

    No gradient [F, d] and no array [T, F] or [T, K, d] is stored. Memory beside the tokens: the weights, twice as much
    for the moments, and for AuxK a copy of the dead features' weights.

    Args:
        W_dec: [F, d] float32, the first dictionary; its rows have norm 1, and training keeps that norm. The encoder
            starts as its transpose, the biases as zero.
        k: active features per token.
        k_aux: dead features per token of the auxiliary loss; 0 leaves it out.
        dead_after: number of tokens after which a feature that was not active is dead.
        precision: of the encoder's product, which chooses the active features, such as bfloat16 for a GPU's matrix
            units; None: that of the weights. Everything else has the weights' precision.
    """

    def __init__(
        self,
        W_dec: Tensor,
        k: int,
        k_aux: int = 0,
        dead_after: int = 10_000_000,
        precision: torch.dtype | None = None,
    ) -> None:
        F, d = W_dec.shape
        self.k, self.k_aux, self.dead_after = k, k_aux, dead_after
        self.precision = precision or W_dec.dtype
        self.W_enc = W_dec.clone(memory_format=torch.contiguous_format).mT  # columns are contiguous
        self.W_dec = W_dec.clone(memory_format=torch.contiguous_format)
        self.b_enc, self.b_dec = W_dec.new_zeros(F), W_dec.new_zeros(d)
        self.m, self.v = ([torch.zeros_like(w) for w in (*self.weights, self.b_dec)] for _ in range(2))
        self.steps = 0
        self.unused = torch.zeros(F, dtype=torch.int64, device=W_dec.device)  # tokens since each was active

    @property
    def weights(self) -> list[Tensor]:
        return [self.W_enc, self.b_enc, self.W_dec]

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite. Waits for the device."""
        return all(bool(w.isfinite().all()) for w in (*self.weights, self.b_dec))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The encoder's input and the reconstruction [T, d], and the values and indices [T, K] of the codes."""
        centred = x - self.b_dec
        values, indices = self._encode(centred, self.W_enc, self.b_enc, self.k)
        return centred, ops.decode_topk(values, indices, self.W_dec, self.b_dec), values, indices

    def _encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = ops.encode_topk(x.to(self.precision), W_enc.to(self.precision), b_enc, None, k)
        return values.to(x.dtype), indices

    def step(self, x: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Train on tokens ``x`` [T, d].

        Returns the loss before the step without its auxiliary term, as a number on the device, and the number of tokens
        in which each feature is active [F].
        """
        centred, x_hat, values, indices = self.reconstruct(x)
        error = x_hat.sub_(x)
        loss = torch.linalg.vector_norm(error).square() / len(x)
        aux = self._auxiliary(centred, error) if self.k_aux else None
        g = error.mul_(2 / len(x))
        self.steps += 1
        of_input, counts = ops.adam_topk(
            centred, g, values, indices, aux, self.weights, self.m[:3], self.v[:3], lr=lr, step=self.steps,
            betas=BETAS, eps=EPS,
        )  # fmt: skip
        _adam(self.b_dec, g.sum(0) - of_input, self.m[3], self.v[3], lr, self.steps)
        self.unused.add_(len(x)).masked_fill_(counts > 0, 0)
        return loss, counts

    def _auxiliary(self, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The gradient at ``e_hat`` [T, d], and the values and indices of its codes; None if no feature is dead."""
        dead = (self.unused >= self.dead_after).nonzero().flatten()
        if not len(dead):
            return None
        W_enc, b_enc, W_dec = self.W_enc.mT[dead].mT, self.b_enc[dead], self.W_dec[dead]
        if len(dead) <= self.k_aux:
            values = torch.addmm(b_enc, centred, W_enc).relu_()
            e_hat, indices = values @ W_dec, dead.expand_as(values)
        else:
            values, among = self._encode(centred, W_enc, b_enc, self.k_aux)
            e_hat, indices = ops.decode_topk(values, among, W_dec, None), dead[among]
        return e_hat.add_(error).mul_(2 * AUX_COEFFICIENT / len(error)), values, indices  # e is -error

    def sae(self, centre: Tensor, unit: Tensor, **described: Any) -> SparseAutoencoder:
        """The SAE of tokens ``centre + unit * x``, with ``x`` as in training. Dictionary rows keep norm 1.

        ``described``: further arguments of :class:`SparseAutoencoder`.
        """
        W_enc, b_dec = self.W_enc.contiguous(), centre + unit * self.b_dec
        return SparseAutoencoder(W_enc, self.b_enc * unit, self.W_dec.clone(), b_dec, "topk", self.k, **described)


def _adam(w: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float, step: int) -> None:
    """Adam's step for one tensor, in place."""
    beta1, beta2 = BETAS
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(EPS)
    w.addcdiv_(m, root, value=-lr / (1 - beta1**step))
