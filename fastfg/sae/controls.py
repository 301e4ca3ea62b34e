"""Controls that a trained SAE must beat: SAEs with a part that stays random.

A recent comparison on language models found frozen dictionaries level with trained ones by explained variance (arXiv
2602.14111). So explained variance alone is no evidence that a dictionary was learned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fastfg.files import write_tensors
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


def at_limit(W: Tensor, start: Tensor) -> Tensor:
    """Which rows of ``W`` [F] :func:`keep_rows_near` holds now."""
    return (W * start).sum(1) <= COSINE + ROUNDING


class RowsAtLimit:
    """Which rows of a soft-frozen dictionary were at their limit after one training step or more, as a row may leave it
    again. If there is none, the limit made no difference.

    Args:
        W: the dictionary before the first step. file: what a checkpoint before gave to :meth:`save`, if it is there.
    """

    def __init__(self, W: Tensor, file: Path) -> None:
        self.start, self.file = W.clone(), file
        self.reached = torch.zeros(len(W), dtype=torch.bool, device=W.device)
        if file.is_file():
            self.reached |= load_file(file)["reached"].to(W.device)

    def look(self, W: Tensor) -> None:
        """Add the rows that are at the limit now."""
        self.reached |= at_limit(W, self.start)

    @property
    def share(self) -> float:
        return float(self.reached.double().mean())

    def save(self) -> None:
        """Write what was seen. Before a checkpoint: a run that goes on from an earlier one comes to the same rows."""
        write_tensors(self.file, {"reached": self.reached.cpu()})


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
