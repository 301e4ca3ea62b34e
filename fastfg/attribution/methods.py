"""Other explanations from the same forward and backward pass: rollout, last attention, Grad-CAM, gradient x input."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral

import torch
from torch import Tensor

from fastfg.attribution.relevancy_pass import over_all_tokens, working_dtype
from fastfg.checks import check_layers
from fastfg.models import Adapter
from fastfg.perturb.masks import PatchGrid
from fastfg.reference.relevancy import attend, rollout


class OtherMethods:
    """Computes ``rollout``, ``last_attention`` and ``grad_cam``, if they are among ``methods``.

    ``rollout`` is attention rollout (Abnar and Zuidema 2020). ``last_attention`` is the attention of the last block,
    or of the pooling head, as the head reads it. Both average over the attention heads.

    Args:
        adapter: the model. n_tokens: ``N``. methods: names in ``fastfg.types.METHODS``; other names are ignored.
        cam_layer: the block whose output Grad-CAM reads; None: see :func:`grad_cam_layer`.

    Attributes:
        layers: the blocks whose outputs ``on_residual`` needs.
    """

    def __init__(self, adapter: Adapter, n_tokens: int, methods: Collection[str], cam_layer: int | None = None) -> None:
        self.adapter, self.n_tokens = adapter, n_tokens
        self.wanted = [name for name in ("rollout", "last_attention") if name in methods]
        self.layers = [grad_cam_layer(adapter, n_tokens, cam_layer)] if "grad_cam" in methods else []
        self.rows: dict[str, Tensor] = {}  # each [B, N], or [B, P]

    def on_residual(self, block: int, x: Tensor, g: Tensor) -> None:
        """Read a block's output and its gradient, both [B, N, d]."""
        if block in self.layers:
            first = self.adapter.num_prefix_tokens
            self.rows["grad_cam"] = grad_cam(x[:, first:], g[:, first:])

    def on_attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        """One step per attention, from the pooling head or the last block to the first block."""
        if not self.wanted:
            return
        if number >= len(self.adapter.blocks):
            if not self.adapter.pooled:
                self._start_at_pooling_head(q, k, dO, scale)
            return
        if self.wanted[0] not in self.rows:
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
        self.rows |= dict.fromkeys(self.wanted, row)

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
        return {name: row[..., -P:].unflatten(-1, grid).contiguous() for name, row in self.rows.items()}


def grad_cam_layer(adapter: Adapter, n_tokens: int, layer: int | None = None) -> int:
    """The block whose output Grad-CAM reads: the last one through whose patches the target depends on the image.

    This is the last block if the head reads patches. If the head reads prefix tokens alone, it does not depend on the
    patches of the last block's output, and their gradient is 0; then it is the block before.

    Raises ValueError for a model that has no such block, and for a ``layer`` that is not one of the blocks up to it;
    TypeError for one that is no int.
    """
    L, n_prefix = len(adapter.blocks), adapter.num_prefix_tokens
    reads_patches = not adapter.pooled or bool(
        adapter.first_row(n_tokens, torch.float32, torch.device("cpu"))[n_prefix:].any()
    )
    last = L - 1 if reads_patches else L - 2
    if last < 0:
        raise ValueError("grad_cam: expected a model of at least two blocks, as its head reads no patches, got one")
    if layer is None:
        return last
    if isinstance(layer, bool) or not isinstance(layer, Integral):
        raise TypeError(f"grad_cam.layer: expected a block, an int from 0 to {last}, or None, got {layer!r}")
    layer = int(layer)
    check_layers("grad_cam.layer", [layer], L)
    if layer > last:
        raise ValueError(
            f"grad_cam.layer: expected at most {last}, as the head does not read the patches of block {layer}, "
            f"got {layer}"
        )
    return layer


def grad_cam(x: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) over tokens: ``max(sum_k mean_t(g_tk) x_tk, 0)`` [B, P].

    ``x`` and its gradient ``g`` are [B, P, d]; each of the ``d`` channels has the weight of its mean gradient.
    """
    x, g = x.to(working_dtype(x)), g.to(working_dtype(g))
    return (x @ g.mean(1).unsqueeze(-1)).squeeze(-1).clamp(min=0)


def gradient_x_input(images: Tensor, gradient: Tensor, grid: PatchGrid) -> Tensor:
    """``images * gradient``, both [B, C, H, W], summed over the channels and over each patch: [B, gh, gw].

    Pixels beyond the last whole patch are left out.
    """
    return over_patches((images * gradient).to(working_dtype(images)).sum(1), grid)


def over_patches(pixels: Tensor, grid: PatchGrid) -> Tensor:
    """The sums of ``pixels`` [B, H, W] over each patch: [B, gh, gw]."""
    return grid.split(pixels).sum((2, 4))
