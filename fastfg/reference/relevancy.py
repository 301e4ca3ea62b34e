"""Equations 1 and 6: gradient-weighted attention, gated by column and accumulated over the blocks.

There are two forms with the same result. The library uses the row form. It keeps only the row or rows that the head
reads, and goes from the last block to the first, like the backward pass. The tests compare it with the matrix form,
which builds the whole N x N relevancy from the first block to the last, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

IDENTITIES = ("transmm", "paper")
TILE = 2**20  # entries of attention at a time, 4 MiB in float32: about the size of a core's caches


def attention_map(attn: Tensor, dattn: Tensor) -> Tensor:
    """``E = mean_h max(A * dy/dA, 0)`` [B, N, N] from ``attn`` and ``dattn`` [B, H, N, N]: clamped, then averaged."""
    return (attn * dattn).clamp(min=0).mean(1)


def relevancy(
    rows: Tensor,  # [C, B, N]
    q: Tensor,  # [B, H, N, dh]
    k: Tensor,  # [B, H, N, dh]
    v: Tensor,  # [B, H, N, dh]
    dO: Tensor,  # [B, H, N, dh]
    scale: float,
    gates: Tensor | None = None,  # [C, B, N], 1 for prefix tokens; None: no gate in this block
    identity: str = "transmm",
) -> Tensor:
    """One block of the row form, ``r <- r + (r @ E) * w`` [C, B, N], with ``E`` from q, k, v and dO.

    With ``identity="paper"`` (eq. 1 taken literally) ``E`` includes the identity, and the gate scales it too. ``E`` is
    computed in chunks of queries, so nothing of size N x N is stored. It has the dtype of ``rows``, regardless of the
    model's.
    """
    q, k, v, dO = (t.to(rows.dtype) for t in (q, k, v, dO))
    flow = torch.zeros_like(rows)
    for n in query_tiles(q):
        attn = torch.softmax(q[:, :, n] @ k.mT * scale, dim=-1)  # A
        dattn = dO[:, :, n] @ v.mT  # dy/dA
        E = attention_map(attn, dattn)  # eq. 1
        flow += torch.einsum("cbn,bnm->cbm", rows[:, :, n], E)
    if identity == "paper":
        flow = flow + rows
    elif identity != "transmm":
        raise ValueError(f"identity: expected one of {IDENTITIES}, got {identity!r}")
    return rows + (flow if gates is None else flow * gates)  # eq. 6


def query_tiles(q: Tensor) -> Iterator[slice]:
    """Slices over the queries of ``q`` [B, H, N, dh]; the attention of a slice has at most TILE entries."""
    B, H, N, _ = q.shape
    size = max(1, TILE // max(1, B * H * N))
    for start in range(0, N, size):
        yield slice(start, start + size)


def rollout(rows: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """One block of attention rollout (Abnar and Zuidema 2020) in its row form: ``r <- r @ (A + I) / 2``.

    ``A`` is averaged over the heads. ``rows`` and the result are [C, B, N].
    """
    return (rows + attend(rows, q, k, scale)) / 2


def attend(rows: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``rows @ mean_h A`` [C, B, N keys], for ``rows`` [C, B, N queries], in chunks of queries."""
    q, k = q.to(rows.dtype), k.to(rows.dtype)
    flow = rows.new_zeros(*rows.shape[:2], k.shape[2])
    for n in query_tiles(q):
        attn = torch.softmax(q[:, :, n] @ k.mT * scale, dim=-1).mean(1)
        flow += torch.einsum("cbn,bnm->cbm", rows[:, :, n], attn)
    return flow


def pooling_row(q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> Tensor:
    """The starting row for an attention-pooling head: the head's own ``mean_h max(A * dA, 0)`` [B, N keys].

    ``q`` and ``dO`` are [B, H, n, dh] for the head's ``n`` learned queries. The maps of the queries are summed; a query
    whose output is not used has no gradient and adds nothing.
    """
    return attention_map(torch.softmax(q @ k.mT * scale, dim=-1), dO @ v.mT).sum(1)


def relevancy_matrix(
    attn: Sequence[Tensor],  # L of [B, H, N, N]
    dattn: Sequence[Tensor],  # L of [B, H, N, N]
    gates: Sequence[Tensor | None],  # L of [B, N] or None
    identity: str = "transmm",
) -> Tensor:
    """The matrix form: ``R <- R + E_l @ R`` over the blocks in order, from ``R = I`` -> [B, N, N]."""
    eye = torch.eye(attn[0].shape[-1], dtype=attn[0].dtype, device=attn[0].device)
    R = eye.expand(attn[0].shape[0], -1, -1)
    for A, dA, w in zip(attn, dattn, gates, strict=True):
        E = attention_map(A, dA)  # eq. 1
        if identity == "paper":
            E = E + eye
        if w is not None:
            E = E @ torch.diag_embed(w)  # eq. 6
        R = R + E @ R
    return R
