"""Controls that a trained SAE must beat: SAEs with a part that stays random.

A recent comparison on language models found frozen dictionaries level with trained ones by explained variance (arXiv
2602.14111). So explained variance alone is no evidence that a dictionary was learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.sae.topk_step import TopKStep

COSINE = 0.8  # of a soft-frozen row with its start, at least
ROUNDING = 1e-5  # of that cosine


def after_step(kind: str, step: TopKStep) -> Callable[[], None]:
    """What the control does after each training step of ``step``, whose weights are still those of its start."""
    W_enc, W_dec = step.W_enc.clone(), step.W_dec.clone()

    def freeze_decoder() -> None:
        step.W_dec.copy_(W_dec)

    def freeze_encoder() -> None:
        step.W_enc.copy_(W_enc)
        step.b_enc.zero_()

    def keep_near() -> None:
        keep_rows_near(step.W_dec, W_dec)

    def nothing() -> None:
        pass

    return {
        "trained": nothing,
        "frozen-decoder": freeze_decoder,
        "frozen-encoder": freeze_encoder,
        "soft-frozen": keep_near,
    }[kind]


def keep_rows_near(W: Tensor, start: Tensor) -> None:
    """Move rows of ``W`` whose cosine with ``start`` is below :data:`COSINE` to the nearest row where it is not.

    Both have rows of norm 1. Changes ``W``.
    """
    along = (W * start).sum(1, keepdim=True)
    across = F.normalize(W - along * start, dim=1)
    nearest = COSINE * start + (1 - COSINE**2) ** 0.5 * across
    W.copy_(torch.where(along < COSINE, nearest, W))


def at_limit(W: Tensor, start: Tensor) -> float:
    """The share of rows of ``W`` that :func:`keep_rows_near` holds. If it is 0, the limit made no difference."""
    return float(((W * start).sum(1) <= COSINE + ROUNDING).double().mean())


def fit_scale(step: TopKStep, x: Tensor, batch_size: int) -> None:
    """Fit one scale of the codes and ``b_dec`` to tokens ``x`` [T, d] by least squares; the codes stay active.

    ``batch_size``: of the batches in which ``batch_topk`` chooses.
    """
    decoded = []
    for batch in x.split(batch_size if step.activation == "batch_topk" else len(x)):
        decoded.append(step.codes(batch).decode(step.W_dec, torch.zeros_like(step.b_dec))[-1])
    reconstructed = torch.cat(decoded)
    mean, mean_decoded = x.mean(0), reconstructed.mean(0)
    spread = (reconstructed - mean_decoded).double()
    scale = float(((x - mean).double() * spread).sum() / spread.square().sum())
    if not scale > 0:
        raise ValueError(f"kind: expected random codes that correlate with the tokens, got a scale of {scale:g}")
    step.b_dec.copy_(mean - scale * mean_decoded)
    step.W_enc.mul_(scale)
    step.b_enc.copy_(step.b_dec @ step.W_enc)  # an SAE subtracts b_dec from its input, and these codes did not
