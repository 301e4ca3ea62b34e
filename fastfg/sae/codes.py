"""The active features of a batch in training: of each token or of the whole batch, and by prefix of the dictionary.

The ops take codes as rows [R, K]. For a TopK SAE with one reconstruction, row t is token t. A token of a BatchTopK SAE
may have more features than a row holds, and a feature of a Matryoshka SAE has a gradient that depends on the prefixes
it is part of. So there, a token has several rows, each with features of one group: those that a prefix has and the
smaller ones do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfg import ops

LEAST = 8  # features per row, so that rows are not too many


class Part(NamedTuple):
    """Rows of different tokens, with features of one group."""

    rows: slice
    group: int
    tokens: Tensor | None  # of each row; None: row t is token t


class Codes(NamedTuple):
    """Codes in rows. The first part has a row for each token, in order."""

    values: Tensor  # [R, K] >= 0, with 0 where a row has fewer features
    indices: Tensor  # [R, K]
    parts: tuple[Part, ...]

    def decode(self, W_dec: Tensor, b_dec: Tensor) -> list[Tensor]:
        """The reconstruction [T, d] of each prefix of the dictionary, the whole dictionary's last."""
        if len(self.parts) == 1:
            return [ops.decode_topk(self.values, self.indices, W_dec, b_dec)]
        decoded = ops.decode_topk(self.values, self.indices, W_dec, None)
        found = [decoded[self.parts[0].rows] + b_dec]
        for part in self.parts[1:]:
            if part.group == len(found):
                found.append(found[-1].clone())
            found[-1][part.tokens] += decoded[part.rows]
        return found

    def spread(self, of_group: Sequence[Tensor]) -> Tensor:
        """``of_group`` has an array [T, d] for each group. Returns the lines that belong to the rows, [R, d]."""
        if len(self.parts) == 1:
            return of_group[0]
        lines = [of_group[0], *(of_group[part.group][part.tokens] for part in self.parts[1:])]
        return torch.cat(lines)

    def extend(self, array: Tensor) -> Tensor:
        """An array of which line t belongs to token t, with as many lines as there are rows. The new ones are 0."""
        new = len(self.values) - len(array)
        return torch.cat([array, array.new_zeros(new, array.shape[1])]) if new else array


def per_token(values: Tensor, indices: Tensor) -> Codes:
    """Codes [T, K] of which each token has as many."""
    return Codes(values, indices, (Part(slice(0, len(values)), 0, None),))


class Pairs(NamedTuple):
    """Active features, in the order of the tokens."""

    tokens: Tensor  # [n]
    indices: Tensor  # [n]
    values: Tensor  # [n], > 0


def pairs_of(values: Tensor, indices: Tensor) -> Pairs:
    """The active ones among codes [T, K]."""
    tokens, ranks = (values > 0).nonzero(as_tuple=True)
    return Pairs(tokens, indices[tokens, ranks], values[tokens, ranks])


def batch_topk(encode: Callable[[Tensor, int], tuple[Tensor, Tensor]], x: Tensor, k: int, n_features: int) -> Pairs:
    """The ``k * T`` largest positive pre-activations of the tokens ``x`` [T, d] (Bussmann et al. 2024).

    Of equal ones, those of the first token are taken first, and of its own the lowest index.

    The largest of each token are enough: where the last of them is still among the largest of the batch, twice as many
    of that token are looked at. So pre-activations [T, F] are never stored.

    Args:
        encode: (tokens, m) -> the m largest pre-activations of each after ReLU, in descending order, and their indices.
    """
    tokens, m, wanted = torch.arange(len(x), device=x.device), min(2 * k, n_features), k * len(x)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        values, indices = encode(x[tokens], m)
        candidates = torch.cat([*(one[1].flatten() for one in seen), values.flatten()])
        least = candidates.kthvalue(len(candidates) - wanted + 1).values  # the smallest one that is kept, or 0
        last = values[:, -1]
        more = (last >= least) & (last > 0) & (m < n_features)
        seen.append((tokens[~more], values[~more], indices[~more]))
        tokens, m = tokens[more], min(2 * m, n_features)
        if not len(tokens):
            break
    found = []
    for tokens, values, indices in seen:
        rows, ranks = ((values >= least) & (values > 0)).nonzero(as_tuple=True)
        found.append((tokens[rows], indices[rows, ranks], values[rows, ranks]))
    tokens, indices, values = (torch.cat(arrays) for arrays in zip(*found, strict=True))
    order = tokens.sort(stable=True).indices
    equal = values[order] == least
    order = order[~(equal & (equal.cumsum(0) > equal.sum() - (len(order) - wanted)))]
    return Pairs(tokens[order], indices[order], values[order])


def pack(pairs: Pairs, T: int, widths: Sequence[int], k: int) -> Codes:
    """Codes in rows of about ``k`` per prefix. ``widths`` are the numbers of features of the prefixes."""
    n_groups, device = len(widths), pairs.values.device
    size = max(min(k, LEAST), math.ceil(k / n_groups))
    group = torch.bucketize(pairs.indices, torch.tensor(widths[:-1], device=device), right=True)
    segment = group * T + pairs.tokens
    # One pair more stands for none: its value is 0.
    none = len(segment)
    order = torch.cat([segment.sort(stable=True).indices, segment.new_full((1,), none)])
    values, indices = (torch.cat([array, array.new_zeros(1)]) for array in (pairs.values, pairs.indices))
    counts = torch.bincount(segment, minlength=n_groups * T).view(n_groups, T)
    first = (counts.flatten().cumsum(0) - counts.flatten()).view(n_groups, T)
    column = torch.arange(size, device=device)
    parts: list[Part] = []
    chosen: list[Tensor] = []
    n_rows = 0
    for g, most in enumerate(counts.amax(1).tolist()):
        for begin in range(0, max(most, 1), size):
            tokens = (counts[g] > begin).nonzero().flatten() if parts else None
            n, start = (counts[g], first[g]) if tokens is None else (counts[g][tokens], first[g][tokens])
            at = start[:, None] + begin + column
            chosen.append(order[torch.where(begin + column < n[:, None], at, none)])
            parts.append(Part(slice(n_rows, n_rows + len(n)), g, tokens))
            n_rows += len(n)
    rows = torch.cat(chosen)
    return Codes(values[rows], indices[rows], tuple(parts))
