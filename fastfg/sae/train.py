"""Train a TopK sparse autoencoder on residual-stream tokens. Features that stop firing are revived."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.sae.model import SparseAutoencoder
from fastfg.sae.recipe import ACTIVATIONS, prefix_widths
from fastfg.sae.report import TOKENS_AT_ONCE, SAEReport, all_same, report
from fastfg.sae.topk_step import TopKStep

WARM_UP, COOL_DOWN = 0.05, 0.3  # shares of the steps in which the learning rate rises and falls
MEASURED = 2**15  # tokens that a threshold is measured on
LARGEST = 1e15  # largest value in a token: its norm is computed in float32
SMALLEST = 1e-18  # smallest mean deviation of the tokens from their mean, for the same reason
ROUNDING = 1e-2  # largest share of the deviation that float64 tokens may lose in float32


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
    k_aux: int = 0,
    dead_after: int = 10_000_000,
    activation: str = "topk",
    prefixes: Sequence[float] = (1.0,),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SparseAutoencoder, SAEReport]:
    """Train a TopK SAE on the tokens ``x`` [T, d] (see :func:`fastfg.residuals`). Returns the SAE and its report.

    Adam minimises the squared error, with unit-norm dictionary rows and a learning rate that is warmed up and cooled
    down. The part of a row's gradient along the row is removed. Training runs in float32, regardless of the dtype of
    ``x``, torch's default dtype and device, and autocast.

    ``revivals`` times in the first half of training, each feature that has not fired since the last time is
    reinitialised from the error of a token, drawn in proportion to its squared error (Bricken et al. 2023). Its encoder
    gets the average norm of the other encoders, because TopK would never choose a feature with a shorter one.

    ``k_aux`` adds the auxiliary loss AuxK of Gao et al. 2024, in which dead features reconstruct what the others leave
    over; :class:`fastfg.sae.topk_step.TopKStep` defines it.

    Args:
        x: [T, d] floating and finite, at least one batch of training tokens that are not all the same.
        n_features: F, the features in the dictionary.
        k: active features per token; for ``batch_topk``, in the mean over a batch.
        epochs: passes over the training tokens.
        batch_size: tokens per step.
        lr: the highest learning rate.
        held_out: the share of tokens, the LAST of ``x``, that is kept for the report. Do not split the tokens of an
            image between the two parts.
        revivals: how often dead features are revived; 0 is never.
        k_aux: dead features per token of the auxiliary loss; 0 leaves it out. Gao et al. use a power of two near d / 2.
        dead_after: for ``k_aux``: a feature is dead if it was active for none of this number of training tokens.
        activation: ``topk``, or ``batch_topk`` (Bussmann et al. 2024): the ``k * batch_size`` largest pre-activations
            of a batch are active. The SAE that is returned has a threshold, and its report the L0 that it gives.
        prefixes: of a Matryoshka SAE (Bussmann et al. 2025): increasing shares of the dictionary up to 1, such as
            ``(0.0625, 0.25, 1)``. The loss is the sum of those of all prefixes.
        seed: seed of the initialisation and of the order of tokens.
        progress: called with (steps done, total steps).

    Raises ValueError or TypeError that names the argument, and RuntimeError if the weights do not stay finite.

    >>> import torch, fastfg
    >>> x = torch.randn(4096, 4) @ torch.randn(4, 16)
    >>> sae, report = fastfg.train_sae(x, n_features=64, k=8, batch_size=64)
    >>> 0 < report.explained_variance < 1
    True
    """
    positive = {
        "n_features": n_features,
        "k": k,
        "epochs": epochs,
        "batch_size": batch_size,
        "dead_after": dead_after,
    }
    whole = {name: (value, 1.0) for name, value in positive.items()}
    whole |= {"revivals": (revivals, 0), "k_aux": (k_aux, 0), "seed": (seed, -math.inf)}
    _check_options(whole, lr, held_out)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    widths = prefix_widths(prefixes, n_features)
    x = x.detach() if isinstance(x, Tensor) else x
    n_train = _check_tokens(x, held_out, batch_size)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        stack.enter_context(torch.no_grad())
        training = _Training(x[:n_train].float(), n_features, k, lr, seed, k_aux, dead_after, activation, widths)
        steps = epochs * (n_train // batch_size)
        revive_at = {round(steps * (i + 1) / (2 * revivals)) for i in range(revivals)} if revivals else set()
        for step, tokens in enumerate(training.batches(epochs, batch_size)):
            if step in revive_at and step:
                training.revive(tokens)
            training.scheduled_step(tokens, step / steps)
            if progress is not None:
                progress(step + 1, steps)
        sae = training.finish(batch_size)
    return sae, report(sae, x[n_train:], steps=steps, revived=training.revived)


class _Training(TopKStep):
    """The weights and the order of the tokens, which are scaled so that their deviation from the mean has norm sqrt(d)
    on average.
    """

    def __init__(
        self,
        x: Tensor,
        n_features: int,
        k: int,
        lr: float,
        seed: int,
        k_aux: int = 0,
        dead_after: int = 1,
        activation: str = "topk",
        widths: Sequence[int] | None = None,
    ) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.x, self.lr, self.revived = x, lr, 0
        self.mean = x.mean(0)
        self.unit = (x - self.mean).norm(dim=-1).mean() / x.shape[-1] ** 0.5
        rows = torch.randn(n_features, x.shape[-1], generator=self.generator, dtype=torch.float32, device="cpu")
        rows = F.normalize(rows, dim=1).to(x.device)
        super().__init__(rows, int(k), int(k_aux), int(dead_after), activation=activation, widths=widths)
        self.fired = torch.zeros(n_features, dtype=torch.bool, device=x.device)

    def batches(self, epochs: int, size: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            order = torch.randperm(len(self.x), generator=self.generator, device="cpu").to(self.x.device)
            for i in range(0, len(order) - size + 1, size):
                yield (self.x[order[i : i + size]] - self.mean) / self.unit

    def scheduled_step(self, x: Tensor, done: float) -> None:
        """A step with the learning rate at the share ``done`` of the training."""
        _, counts = self.step(x, self.lr * min(1.0, (done + 1e-3) / WARM_UP, (1 - done) / COOL_DOWN))
        self.fired |= counts > 0

    def revive(self, x: Tensor) -> None:
        """Reinitialise the features that have not fired since the last call, from the errors of tokens ``x``."""
        self._check_finite()
        dead = (~self.fired).nonzero().flatten()
        self.fired.zero_()
        error = x - self.reconstruct(x)
        chance = error.square().sum(-1).cpu()
        if not len(dead) or not bool(chance.any()):  # without an error there is no direction to start from
            return
        chosen = torch.multinomial(chance, len(dead), replacement=True, generator=self.generator)
        directions = F.normalize(error[chosen.to(x.device)], dim=1)
        self.W_dec[dead] = directions
        self.W_enc[:, dead] = (directions * self.W_enc.norm(dim=0).mean()).T
        self.b_enc[dead] = 0
        for W_enc, b_enc, W_dec, _ in (self.m, self.v):
            W_enc[:, dead] = 0
            b_enc[dead] = 0
            W_dec[dead] = 0
        self.revived += len(dead)

    def _check_finite(self) -> None:
        if not self.is_finite():
            raise RuntimeError(f"lr: expected training to stay finite, got NaN or infinite weights with lr={self.lr}")

    def finish(self, batch_size: int) -> SparseAutoencoder:
        """The SAE in the tokens' own units: codes are multiplied by ``unit``, and dictionary rows keep norm 1.

        The threshold of a ``batch_topk`` SAE is measured on up to :data:`MEASURED` tokens in batches of ``batch_size``.
        """
        self._check_finite()
        if self.activation == "topk":
            return self.sae(self.mean, self.unit)
        order = torch.randperm(len(self.x), generator=self.generator, device="cpu")[: max(MEASURED, batch_size)]
        x = (self.x[order.to(self.x.device)] - self.mean) / self.unit
        return self.sae(self.mean, self.unit, self.threshold(x, batch_size))


def _check_options(whole: dict[str, tuple[int, float]], lr: float, held_out: float) -> None:
    """Check the arguments. ``whole`` has the integer arguments, each as (value, least allowed value)."""
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least:g}, got {value}")
    if whole["k"][0] > whole["n_features"][0]:
        raise ValueError(f"k: expected 1 to n_features={whole['n_features'][0]}, got {whole['k'][0]}")
    seed = whole["seed"][0]
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected -2**63 to 2**64 - 1, got {seed}")
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a number > 0, got {lr!r}")
    if not isinstance(held_out, Real) or not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out!r}")


def _check_tokens(x: Tensor, held_out: float, batch_size: int) -> int:
    """Check the tokens. Returns how many of them are for training."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point() or not x.shape[1]:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected floating tokens [T, d], got {got}")
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite tokens, got NaN or infinity")
    n_train = round(len(x) * (1 - held_out))
    if n_train < batch_size:
        raise ValueError(
            f"x: expected at least one batch of {batch_size} training tokens, got {len(x)} in all (batch_size makes it "
            "smaller)"
        )
    if len(x) - n_train < 2:
        raise ValueError(
            f"held_out: expected a share that keeps at least 2 of the {len(x)} tokens, got {held_out}, which keeps "
            f"{len(x) - n_train}"
        )
    for part, tokens in (("training", x[:n_train]), ("held-out", x[n_train:])):
        if all_same(tokens):
            raise ValueError(f"x: expected {part} tokens that differ, got {len(tokens)} that are all the same")
    largest = float(x.abs().max())
    if largest > LARGEST:
        raise ValueError(f"x: expected values up to {LARGEST:g}, whose squares fit float32, got {largest:g}")
    _check_precision(x)
    return n_train


def _check_precision(x: Tensor) -> None:
    """Check that the tokens' deviations from their mean survive in float32, in which training runs."""
    parts = x.split(TOKENS_AT_ONCE)
    mean = sum(tokens.double().sum(0) for tokens in parts) / len(x)

    def mean_norm(of: Callable[[Tensor], Tensor]) -> float:
        return sum(float(of(tokens.double()).norm(dim=1).sum()) for tokens in parts) / len(x) / x.shape[1] ** 0.5

    deviation = mean_norm(lambda tokens: tokens - mean)
    if not deviation >= SMALLEST:
        raise ValueError(f"x: expected tokens that deviate from their mean by {SMALLEST:g} or more, got {deviation:g}")
    lost = mean_norm(lambda tokens: tokens - tokens.float().double()) if x.dtype == torch.float64 else 0.0
    if lost > ROUNDING * deviation:
        raise ValueError(
            f"x: expected tokens whose deviation from their mean ({deviation:g}) fits float32, got {x.dtype} tokens "
            f"that lose {lost:g} of it (subtract their mean)"
        )
