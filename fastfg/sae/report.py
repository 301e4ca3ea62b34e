"""How well an SAE reconstructs tokens, and how many of its features are active."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfg.sae.model import SparseAutoencoder

TOKENS_AT_ONCE = 2048
SUMS = ("error", "variance", "norm", "norm_hat", "error_normalized", "variance_normalized", "size")


@dataclass(frozen=True)
class SAEReport:
    """Quality of an SAE on tokens. For one that was just trained, these are tokens that it was not trained on.

    Attributes:
        explained_variance: ``1 - sum (x - x_hat)^2 / sum (x - mean x)^2``, with the mean per dimension.
        dead_share: share of the features that are not active on any of these tokens.
        l0: mean number of active features per token.
        tokens: number of tokens that the values were measured on.
        steps: number of training steps.
        revived: number of features revived during training.
        norm_ratio: mean norm of the reconstructions, divided by the mean norm of the tokens.
        explained_variance_normalized: the explained variance in the space in which the SAE works, after its own
            normalisation. For an SAE that has none, it is ``explained_variance``. NaN if all tokens are the same there,
            up to rounding.
    """

    explained_variance: float
    dead_share: float
    l0: float
    tokens: int
    steps: int = 0
    revived: int = 0
    norm_ratio: float = math.nan
    explained_variance_normalized: float = math.nan

    @classmethod
    def read(cls, described: Any) -> SAEReport:
        """The report of a dict of the fields, as JSON has it. Raises ValueError or TypeError for other fields."""
        found = cls(**described)
        for name, value in vars(found).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected a number, got {value!r:.80}")
        return found


@torch.no_grad()
def report(sae: SparseAutoencoder, x: Tensor, *, steps: int = 0, revived: int = 0) -> SAEReport:
    """The :class:`SAEReport` of any SAE on tokens ``x`` [T, d], summed in float64.

    Raises ValueError if all tokens are the same, because their variance is 0, and where numbers are too small or too
    large: for the SAE's dtype, or for squares in float64.
    """
    if len(x) == 0 or all_same(x):
        raise ValueError(f"x: expected tokens that differ to report on, got {len(x)} that are all the same")
    mean, mean_normalized = x.double().mean(0), _mean_normalized(sae, x)
    sums = dict.fromkeys(
        ("error", "variance", "error_normalized", "variance_normalized", "norm", "norm_hat", "size"), 0.0
    )
    active, alive = 0.0, torch.zeros(sae.n_features, dtype=torch.bool, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for tokens in x.split(TOKENS_AT_ONCE):
            f, normalized = sae.encode(tokens), sae.normalize(tokens)
            decoded, values = sae.decode(f), normalized.values.double()
            restored = (decoded * normalized.scale + normalized.shift).double()
            sums["error"] += float((tokens.double() - restored).square().sum())
            sums["variance"] += float((tokens.double() - mean).square().sum())
            sums["error_normalized"] += float((values - decoded.double()).square().sum())
            sums["variance_normalized"] += float((values - mean_normalized).square().sum())
            sums["size"] += float(values.square().sum())
            sums["norm"] += float(tokens.double().norm(dim=-1).sum())
            sums["norm_hat"] += float(restored.norm(dim=-1).sum())
            active += float((f != 0).sum())
            alive |= (f != 0).any(0)
    _check(sums, sae.W_enc.dtype)
    rounding = max(torch.finfo(dtype).eps for dtype in (x.dtype, sae.W_enc.dtype)) ** 2 * sums["size"]
    return SAEReport(
        explained_variance=1 - sums["error"] / sums["variance"],
        dead_share=1 - float(alive.double().mean()),
        l0=active / len(x),
        tokens=len(x),
        steps=steps,
        revived=revived,
        norm_ratio=sums["norm_hat"] / sums["norm"],
        explained_variance_normalized=_share(sums["error_normalized"], sums["variance_normalized"], rounding),
    )


@torch.no_grad()
def explained_variance(sae: SparseAutoencoder, x: Tensor) -> float:
    """The explained variance of tokens ``x`` [T, d]; NaN if they are all the same."""
    with torch.autocast(x.device.type, enabled=False):
        error = (x.double() - sae(x).double()).square().sum()
    return _share(float(error), float((x.double() - x.double().mean(0)).square().sum()))


def all_same(x: Tensor) -> bool:
    """Whether all tokens of ``x`` [T, d] are equal."""
    return bool((x == x[0]).all())


def _share(error: float, variance: float, rounding: float = 0.0) -> float:
    return 1 - error / variance if variance > rounding else math.nan


def _check(sums: dict[str, float], dtype: torch.dtype) -> None:
    """Refuse sums that say nothing."""
    if not all(map(math.isfinite, sums.values())):
        raise ValueError(
            f"sae: expected finite codes and reconstructions of these tokens, got NaN or infinity in {dtype} (tokens "
            "too large for it, or a token of zeros with constant_norm)"
        )
    if not sums["variance"] > 0 or not sums["norm"] > 0:
        raise ValueError("x: expected tokens whose variance is not 0 in float64, got smaller differences")


def _mean_normalized(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The mean per dimension of the normalised tokens, [d] in float64."""
    parts = [sae.normalize(tokens).values.double().sum(0) for tokens in x.split(TOKENS_AT_ONCE)]
    return torch.stack(parts).sum(0) / len(x)
