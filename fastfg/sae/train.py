"""Training a TopK sparse autoencoder on residual-stream tokens, with dead features brought back to life."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.sae.model import SparseAutoencoder

WARM_UP, COOL_DOWN = 0.05, 0.3  # shares of the steps in which the learning rate rises and falls


@dataclass(frozen=True)
class SAEReport:
    """How good a trained SAE is, on tokens that it was not trained on.

    Attributes:
        explained_variance: ``1 - sum (x - x_hat)^2 / sum (x - mean x)^2``.
        dead_share: share of the features that are active on none of these tokens.
        l0: mean number of active features a token.
        tokens: how many tokens these three were measured on. steps: training steps. revived: features revived.
    """

    explained_variance: float
    dead_share: float
    l0: float
    tokens: int
    steps: int = 0
    revived: int = 0


def train_sae(
    x: Tensor,
    n_features: int,
    k: int,
    *,
    epochs: int = 3,
    batch_size: int = 512,
    lr: float = 3e-3,
    held_out: float = 0.1,
    revivals: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SparseAutoencoder, SAEReport]:
    """Train a TopK SAE on the tokens ``x`` [T, d] (see :func:`fastfg.residuals`); returns it and its report.

    Adam on the squared error, unit-norm dictionary rows, learning rate warmed up and cooled down. ``revivals``
    times in the first half of training, every feature that has not fired since the last time starts anew from
    the error of a token, drawn in proportion to its squared error (Bricken et al. 2023, but with an encoder as long
    as the others': among TopK features a short one would never be chosen).

    Args:
        x: [T, d] floating. n_features: F. k: active features a token.
        held_out: the share of tokens, the LAST of ``x``, that is kept for the report; keep images whole.
        seed: of the initialisation and the order of tokens. progress: called with (steps done, steps in all).

    >>> import torch, fastfg
    >>> x = torch.randn(4096, 4) @ torch.randn(4, 16)
    >>> sae, report = fastfg.train_sae(x, n_features=64, k=8, batch_size=64)
    >>> 0 < report.explained_variance < 1
    True
    """
    _check(x, n_features, k, held_out, batch_size)
    n_train = round(len(x) * (1 - held_out))
    training = _Training(x[:n_train].detach().float(), n_features, k, lr, seed)
    steps = epochs * (n_train // batch_size)
    revive_at = {round(steps * (i + 1) / (2 * revivals)) for i in range(revivals)} if revivals else set()
    with torch.enable_grad():
        for step, tokens in enumerate(training.batches(epochs, batch_size)):
            if step in revive_at and step:
                training.revive(tokens)
            training.step(tokens, step / steps)
            if progress is not None:
                progress(step + 1, steps)
    sae = training.finish()
    return sae, report(sae, x[n_train:], steps=steps, revived=training.revived)


@torch.no_grad()
def report(sae: SparseAutoencoder, x: Tensor, *, steps: int = 0, revived: int = 0) -> SAEReport:
    """The :class:`SAEReport` of any SAE on tokens ``x`` [T, d]."""
    if len(x) == 0:
        raise ValueError("x: expected at least one token to report on, got none")
    mean = x.mean(0)
    error = variance = active = 0.0
    alive = torch.zeros(sae.n_features, dtype=torch.bool, device=x.device)
    for tokens in x.split(2048):
        f = sae.encode(tokens)
        error += float((tokens - sae.decode(f, sae.normalize(tokens))).square().sum(dtype=torch.float64))
        variance += float((tokens - mean).square().sum(dtype=torch.float64))
        active += float((f > 0).sum())
        alive |= (f > 0).any(0)
    dead = 1 - float(alive.double().mean())
    return SAEReport(1 - error / variance, dead, active / len(x), len(x), steps, revived)


class _Training:
    """Weights in the units in which a token's deviation from the mean has norm sqrt(d)."""

    def __init__(self, x: Tensor, n_features: int, k: int, lr: float, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.k, self.lr, self.revived = x, k, lr, 0
        self.mean = x.mean(0)
        self.unit = (x - self.mean).norm(dim=-1).mean() / x.shape[-1] ** 0.5
        self.W_dec = F.normalize(torch.randn(n_features, x.shape[-1], generator=self.generator), dim=1).to(x.device)
        self.W_enc = self.W_dec.T.clone()
        self.b_enc = torch.zeros(n_features, device=x.device)
        self.b_dec = torch.zeros_like(self.mean)
        self.weights = [w.requires_grad_() for w in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)]
        self.optimizer = torch.optim.Adam(self.weights, lr=lr, fused=True)
        self.fired = torch.zeros(n_features, dtype=torch.bool, device=x.device)

    def batches(self, epochs: int, size: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
            for i in range(0, len(order) - size + 1, size):
                yield (self.x[order[i : i + size]] - self.mean) / self.unit

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction [T, d] with the values and indices [T, K] of the codes."""
        values, indices = ((x - self.b_dec) @ self.W_enc + self.b_enc).topk(self.k, dim=-1, sorted=False)
        values = values.relu()
        decoded = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return decoded + self.b_dec, values, indices

    def step(self, x: Tensor, done: float) -> None:
        x_hat, values, indices = self.reconstruct(x)
        loss = (x_hat - x).square().sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (done + 1e-3) / WARM_UP, (1 - done) / COOL_DOWN)
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            self.fired[indices[values > 0]] = True

    @torch.no_grad()
    def revive(self, x: Tensor) -> None:
        """Start the features that have not fired since the last call anew, from the errors of tokens ``x``."""
        dead = (~self.fired).nonzero().flatten()
        self.fired.zero_()
        if not len(dead):
            return
        error = x - self.reconstruct(x)[0]
        chance = error.square().sum(-1).cpu()
        chosen = torch.multinomial(chance, len(dead), replacement=True, generator=self.generator)
        directions = F.normalize(error[chosen.to(x.device)], dim=1)
        self.W_dec[dead] = directions
        self.W_enc[:, dead] = (directions * self.W_enc.norm(dim=0).mean()).T
        self.b_enc[dead] = 0
        for weight, of_dead in ((self.W_dec, (dead,)), (self.W_enc, (slice(None), dead)), (self.b_enc, (dead,))):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment][of_dead] = 0
        self.revived += len(dead)

    def finish(self) -> SparseAutoencoder:
        """The SAE in the tokens' own units: codes grow by ``unit``, the dictionary rows keep norm 1."""
        W_enc, b_enc, W_dec, b_dec = (w.detach() for w in self.weights)
        return SparseAutoencoder(
            W_enc.clone(), b_enc * self.unit, W_dec.clone(), self.mean + self.unit * b_dec, "topk", self.k
        )


def _check(x: Tensor, n_features: int, k: int, held_out: float, batch_size: int) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating tokens [T, d], got {x.dtype} {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite tokens, got NaN or infinity")
    if not 1 <= k <= n_features:
        raise ValueError(f"k: expected 1 to n_features={n_features}, got {k}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    if round(len(x) * (1 - held_out)) < batch_size:
        raise ValueError(f"x: expected at least one batch of {batch_size} training tokens, got {len(x)} in all")
