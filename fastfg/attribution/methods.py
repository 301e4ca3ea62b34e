"""Other explanations from the same forward and backward pass: rollout, the last attention, gradient x input."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from fastfg.attribution.relevancy_pass import over_all_tokens, working_dtype
from fastfg.models import Adapter
from fastfg.reference.relevancy import attend, rollout


class OtherMethods:
    """Computes ``rollout`` and ``last_attention``, if they are among ``methods``.

    ``rollout`` is attention rollout (Abnar and Zuidema 2020). ``last_attention`` is the attention of the last block,
    or of the pooling head, as the head reads it. Both average over the attention heads.

    Args:
        adapter: the model. n_tokens: ``N``. methods: names in ``fastfg.types.METHODS``; other names are ignored.
    """

    def __init__(self, adapter: Adapter, n_tokens: int, methods: Collection[str]) -> None:
        self.adapter, self.n_tokens = adapter, n_tokens
        self.wanted = [name for name in ("rollout", "last_attention") if name in methods]
        self.rows: dict[str, Tensor] = {}  # each [B, N]

    def on_attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        """One step per attention, from the pooling head or the last block to the first block."""
        if not self.wanted:
            return
        if number >= len(self.adapter.blocks):
            if not self.adapter.pooled:
                self._start_at_pooling_head(q, k, dO, scale)
            return
        if not self.rows:
            self._start_at_last_block(q, k, scale)
        if "rollout" in self.wanted:
            self.rows["rollout"] = rollout(self.rows["rollout"].unsqueeze(0), q, k, scale)[0]

    def _start_at_pooling_head(self, q: Tensor, k: Tensor, dO: Tensor, scale: float) -> None:
        """Start from the head's own attention, averaged over the queries whose output the target depends on."""
        q, k = q.to(working_dtype(q)), k.to(working_dtype(k))
        read = (dO != 0).any(-1).any(1)  # [B, queries]
        read |= ~read.any(-1, keepdim=True)  # an image without gradients: all queries
        row = attend((read.to(q.dtype) / read.sum(-1, keepdim=True)).unsqueeze(0), q, k, scale)[0]
        row = over_all_tokens(row, self.n_tokens, self.adapter.num_prefix_tokens)
        self.rows = dict.fromkeys(self.wanted, row)

    def _start_at_last_block(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Start from the rows that the head reads."""
        row = self.adapter.first_row(self.n_tokens, working_dtype(q), q.device).expand(q.shape[0], -1)
        if "rollout" in self.wanted:
            self.rows["rollout"] = row
        if "last_attention" in self.wanted:
            self.rows["last_attention"] = attend(row.unsqueeze(0), q, k, scale)[0]

    def maps(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """{method: [B, gh, gw]}."""
        P = grid[0] * grid[1]
        return {name: self.rows[name][..., -P:].unflatten(-1, grid).contiguous() for name in self.wanted}


def gradient_x_input(
    images: Tensor, gradient: Tensor, grid: tuple[int, int], patch_size: tuple[int, int] | None
) -> Tensor:
    """``images * gradient``, both [B, C, H, W], summed over the channels and over each patch: [B, gh, gw].

    Pixels beyond the last whole patch are left out. ``patch_size`` None: the grid divides the image evenly.
    """
    gh, gw = grid
    product = (images * gradient).to(working_dtype(images)).sum(1)
    if patch_size is not None:
        product = product[:, : gh * patch_size[0], : gw * patch_size[1]]
    return product.unflatten(-1, (gw, -1)).unflatten(1, (gh, -1)).sum((2, 4))
