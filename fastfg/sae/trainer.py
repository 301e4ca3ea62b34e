"""Train one TopK SAE batch by batch, in a state that can be saved at any step and resumed to the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfg.files import write_tensors
from fastfg.sae.controls import after_step, fit_scale
from fastfg.sae.model import SparseAutoencoder
from fastfg.sae.recipe import Recipe
from fastfg.sae.topk_step import TopKStep

MEDIAN_ROUNDS = 20  # of Weiszfeld's algorithm
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec")


class SAETrainer(TopKStep):
    """The weights, moments and counters of one SAE in training.

    Tokens are shifted by the geometric median of ``first`` and divided by a ``unit``, so that the deviation of those
    tokens has norm sqrt(d) on average. The dictionary starts with random rows of norm 1, the encoder as its transpose,
    and the biases as zero. So ``b_dec`` starts at the geometric median.

    Args:
        recipe: what to do. first: [n, d] float32, some of the tokens to train on. The threshold of a ``batch_topk`` SAE
            is measured on them, too.

    Attributes:
        done: number of steps that are done.
    """

    def __init__(self, recipe: Recipe, first: Tensor) -> None:
        self.recipe, self.done, self.first = recipe, 0, first
        self.centre = geometric_median(first)
        self.unit = (first - self.centre).norm(dim=1).mean() / first.shape[1] ** 0.5
        if not float(self.unit) > 0:
            raise ValueError(f"first: expected tokens that differ, got {len(first)} that are all the same")
        random = torch.Generator("cpu").manual_seed(recipe.seed)
        rows = F.normalize(torch.randn(recipe.n_features, first.shape[1], generator=random), dim=1)
        precision = getattr(torch, recipe.precision)
        super().__init__(
            rows.to(first.device),
            recipe.k,
            recipe.k_aux,
            recipe.dead_after,
            precision,
            recipe.activation,
            recipe.widths,
        )
        if recipe.kind == "random":
            fit_scale(self, self.scaled(first), recipe.batch_size)
            self.done = recipe.steps
        else:
            self._hold = after_step(recipe.kind, self)

    def scaled(self, x: Tensor) -> Tensor:
        """Tokens [T, d] as the steps see them."""
        return (x - self.centre) / self.unit

    @torch.no_grad()
    def train(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step on tokens ``x`` [T, d]. Returns what :meth:`step` returns."""
        found = self.step(self.scaled(x), self.recipe.learning_rate(self.done))
        self._hold()
        self.done += 1
        return found

    @torch.no_grad()
    def progress(self, x: Tensor, losses: Tensor, counts: Tensor) -> dict[str, float]:
        """Explained variance and L0 of tokens ``x`` before the step that gave ``losses`` and ``counts``, and the share
        of features that are dead. Waits for the device.

        The share is NaN as long as fewer tokens were seen than a feature must miss to be dead.
        """
        scaled = self.scaled(x)
        variance = (scaled - scaled.mean(0)).square().sum() / len(x)
        dead = (self.unused >= self.dead_after).double().mean()
        numbers = torch.stack([1 - losses[-1].double() / variance, counts.double().sum() / len(x), dead]).tolist()
        if self.done * self.recipe.batch_size < self.dead_after:
            numbers[2] = math.nan
        return dict(zip(("explained_variance", "l0", "dead_share"), numbers, strict=True))

    def finish(self, **provenance: Any) -> SparseAutoencoder:
        """The SAE in the tokens' own units. Raises ValueError if the weights are not finite."""
        if not self.is_finite():
            raise ValueError(
                f"lr: expected training to stay finite, got NaN or infinite weights with lr={self.recipe.lr}"
            )
        threshold = None
        if self.recipe.activation == "batch_topk":
            threshold = self.threshold(self.scaled(self.first), self.recipe.batch_size)
        return self.sae(self.centre, self.unit, threshold, provenance=provenance)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Views of all tensors that training changes, by name."""
        groups = {"": (*self.weights, self.b_dec), "m.": self.m, "v.": self.v}
        found = {
            prefix + name: tensor.mT if name == "W_enc" else tensor  # whose columns are contiguous
            for prefix, tensors in groups.items()
            for name, tensor in zip(PARTS, tensors, strict=True)
        }
        return found | {"unused": self.unused}

    def save(self, file: Path, **described: Any) -> None:
        """Write a checkpoint. It replaces the one in ``file`` when it is complete."""
        meta = {"recipe": self.recipe.as_dict(), "done": self.done, **described}
        state = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        write_tensors(file, state, {"training": json.dumps(meta, sort_keys=True)})

    def resume(self, file: Path, **described: Any) -> None:
        """Go on from a checkpoint.

        Raises ValueError if it was made with another recipe, or if what was ``described`` differs.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                meta = json.loads((stored.metadata() or {}).get("training", "{}"))
                state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dictionary
        except (OSError, SafetensorError) as error:
            raise ValueError(f"out: expected a checkpoint in {file}, got {error} (remove it to start again)") from None
        wanted = {"recipe": self.recipe.as_dict(), **described}
        for name, value in wanted.items():
            if meta.get(name) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"out: expected a checkpoint with {name} {value}, got {meta.get(name)} in {file} (remove it to "
                    "start again)"
                )
        own = self._tensors()
        if state.keys() != own.keys() or any(state[name].shape != tensor.shape for name, tensor in own.items()):
            raise ValueError(f"out: expected a checkpoint of this training, got other tensors in {file}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.done = int(meta["done"])
        self.steps = self.done


def geometric_median(x: Tensor) -> Tensor:
    """The point [d] with the smallest sum of distances to the tokens ``x`` [T, d], by Weiszfeld's algorithm."""
    found = x.double().mean(0)
    for _ in range(MEDIAN_ROUNDS):
        weights = 1 / (x.double() - found).norm(dim=1).clamp(min=1e-12)
        found = (x.double() * weights[:, None]).sum(0) / weights.sum()
    return found.to(x.dtype)
