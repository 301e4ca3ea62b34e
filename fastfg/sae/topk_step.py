"""One training step of a TopK SAE: a dense encoder product, and everything else from the active features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfg import ops
from fastfg.sae.codes import Codes, batch_topk, pack, pairs_of, per_token
from fastfg.sae.model import SparseAutoencoder

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's
AUX_COEFFICIENT = 1 / 32  # weight of the auxiliary loss, from Gao et al. 2024


class TopKStep:
    """The weights of a TopK SAE with their Adam moments, and the step that trains them.

    The loss is ``mean_t |x_t - x_hat_t|^2``. With ``k_aux`` it has a second term from Gao et al. 2024 (AuxK), which
    keeps dead features from staying dead: ``mean_t |e_t - e_hat_t|^2 / 32``. Here ``e = x - x_hat`` without a gradient,
    and ``e_hat`` is its reconstruction from the ``k_aux`` dead features with the largest pre-activations, after ReLU
    and without ``b_dec``. A feature is dead if it was active for none of the last ``dead_after`` tokens.

    ``batch_topk`` (Bussmann et al. 2024) keeps the ``k * T`` largest positive pre-activations of a batch of T tokens,
    so tokens differ in how many features they have. The trained SAE has a threshold in its place (:meth:`threshold`).

    With more than one of ``widths``, the SAE is a Matryoshka SAE (Bussmann et al. 2025): the loss is the sum of
    ``mean_t |x_t - x_hat_t|^2`` over reconstructions from the first ``width`` features alone. Which features are active
    is decided among all of them, and ``e`` is that of the whole dictionary.

    No gradient [F, d] and no array [T, F] or [T, K, d] is stored. Memory beside the tokens: the weights, twice as much
    for the moments, and for AuxK a copy of the dead features' weights. ``batch_topk`` stores up to twice as many rows
    of tokens, codes and gradients as there are tokens, and a Matryoshka SAE up to twice as many per width. The number
    of rows depends on the codes, so each step of both waits for the device, as does one with ``k_aux``.

    Args:
        W_dec: [F, d] float32, the first dictionary; its rows have norm 1, and training keeps that norm. The encoder
            starts as its transpose, the biases as zero.
        k: active features per token.
        k_aux: dead features per token of the auxiliary loss; 0 leaves it out.
        dead_after: number of tokens after which a feature that was not active is dead.
        precision: of the encoder's product, which chooses the active features, such as bfloat16 for a GPU's matrix
            units; None: that of the weights. Everything else has the weights' precision.
        activation: ``topk`` or ``batch_topk``.
        widths: number of features of each prefix of the dictionary, increasing to F; None: the whole dictionary alone.
    """

    def __init__(
        self,
        W_dec: Tensor,
        k: int,
        k_aux: int = 0,
        dead_after: int = 10_000_000,
        precision: torch.dtype | None = None,
        activation: str = "topk",
        widths: Sequence[int] | None = None,
    ) -> None:
        F, d = W_dec.shape
        self.activation, self.widths = activation, list(widths or [F])
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

    def codes(self, centred: Tensor) -> Codes:
        """The active features of tokens of which ``b_dec`` is already subtracted, [T, d]."""
        if self.activation == "batch_topk":
            pairs = batch_topk(
                lambda x, m: self._encode(x, self.W_enc, self.b_enc, m), centred, self.k, len(self.b_enc)
            )
            return pack(pairs, len(centred), self.widths, self.k)
        values, indices = self._encode(centred, self.W_enc, self.b_enc, self.k)
        if len(self.widths) == 1:
            return per_token(values, indices)
        return pack(pairs_of(values, indices), len(centred), self.widths, self.k)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The reconstruction [T, d] of a batch of tokens."""
        return self.codes(x - self.b_dec).decode(self.W_dec, self.b_dec)[-1]

    def threshold(self, x: Tensor, batch_size: int) -> Tensor:
        """What the ``batch_topk`` SAE compares pre-activations with when it is used, a number on the device.

        It is the mean over batches of tokens ``x`` [T, d] of the smallest positive value that is kept. Tokens that do
        not fill a batch are left out. Raises ValueError if no feature is active in any batch.
        """
        kept = [batch for batch in x.split(batch_size) if len(batch) == min(batch_size, len(x))]
        active = (values[values > 0] for values in (self.codes(batch - self.b_dec).values for batch in kept))
        smallest = [values.min() for values in active if len(values)]
        if not smallest:
            raise ValueError("x: expected tokens with an active feature, to get the threshold from, got none")
        return torch.stack(smallest).mean()

    def _encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = ops.encode_topk(x.to(self.precision), W_enc.to(self.precision), b_enc, None, k)
        return values.to(x.dtype), indices

    def step(self, x: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Train on tokens ``x`` [T, d].

        Returns the loss of each width before the step, without the auxiliary term: one number on the device per width,
        that of the whole dictionary last. And the number of tokens in which each feature is active [F].
        """
        centred = x - self.b_dec
        codes = self.codes(centred)
        errors = [x_hat.sub_(x) for x_hat in codes.decode(self.W_dec, self.b_dec)]
        losses = torch.stack([torch.linalg.vector_norm(error).square() / len(x) for error in errors])
        aux = self._auxiliary(centred, errors[-1]) if self.k_aux else None
        gradients = [error.mul_(2 / len(x)) for error in errors]
        for i in reversed(range(len(gradients) - 1)):  # a feature is part of its own prefix and of all larger ones
            gradients[i].add_(gradients[i + 1])
        self.steps += 1
        of_input, counts = ops.adam_topk(
            codes.spread([centred] * len(gradients)), codes.spread(gradients), codes.values, codes.indices,
            None if aux is None else (codes.extend(aux[0]), codes.extend(aux[1]), codes.extend(aux[2])),
            self.weights, self.m[:3], self.v[:3], lr=lr, step=self.steps, betas=BETAS, eps=EPS,
        )  # fmt: skip
        _adam(self.b_dec, gradients[0].sum(0) - of_input, self.m[3], self.v[3], lr, self.steps)
        self.unused.add_(len(x)).masked_fill_(counts > 0, 0)
        return losses, counts

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

    def sae(self, centre: Tensor, unit: Tensor, threshold: Tensor | None = None, **described: Any) -> SparseAutoencoder:
        """The SAE of tokens ``centre + unit * x``, with ``x`` as in training. Dictionary rows keep norm 1.

        ``threshold``: of a ``batch_topk`` SAE, from :meth:`threshold`. ``described``: further arguments of
        :class:`SparseAutoencoder`.
        """
        weights = (self.W_enc.contiguous(), self.b_enc * unit, self.W_dec.clone(), centre + unit * self.b_dec)
        if threshold is None:
            return SparseAutoencoder(*weights, "topk", self.k, **described)
        return SparseAutoencoder(*weights, "batch_topk", threshold=unit * threshold, **described)


def _adam(w: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float, step: int) -> None:
    """Adam's step for one tensor, in place."""
    beta1, beta2 = BETAS
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(EPS)
    w.addcdiv_(m, root, value=-lr / (1 - beta1**step))
