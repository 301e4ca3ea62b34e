"""What an SAE is trained with: everything that its weights depend on beside the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

CONTROLS = ("frozen-decoder", "soft-frozen", "frozen-encoder", "random")
KINDS = ("trained", *CONTROLS)
PRECISIONS = ("float32", "bfloat16")
ACTIVATIONS = ("topk", "batch_topk")


@dataclass(frozen=True)
class Recipe:
    """How :class:`fastfg.sae.trainer.SAETrainer` trains one TopK SAE.

    Attributes:
        n_features: F. k: active features per token; for ``batch_topk``, in the mean over a batch.
        steps: number of training steps. batch_size: tokens per step.
        lr: the highest learning rate of Adam. It rises during the share ``warm_up`` of the steps and then falls to 0
            along a cosine.
        k_aux: dead features per token of the auxiliary loss (:class:`fastfg.sae.topk_step.TopKStep`); 0: no such loss.
        dead_after: a feature that was not active for this number of tokens is dead.
        kind: ``trained``, or a control that shares everything else with it:

            - ``frozen-decoder``: the dictionary keeps its random unit rows; encoder and biases are trained.
            - ``soft-frozen``: each dictionary row stays within a cosine of 0.8 of its random start.
            - ``frozen-encoder``: the encoder keeps its random start (the transpose of the dictionary's, and no bias);
              the dictionary and ``b_dec`` are trained.
            - ``random``: dictionary and encoder keep their random start; one scale of all codes and ``b_dec`` are
              fitted by least squares, and nothing else is trained.
        precision: of the encoder's product: ``float32``, or ``bfloat16`` for a GPU.
        seed: of the random start.
        activation: ``topk`` or ``batch_topk`` (:class:`fastfg.sae.topk_step.TopKStep`).
        prefixes: of a Matryoshka SAE: increasing shares of the dictionary up to 1, such as (0.0625, 0.25, 1). The
            loss is the sum of those of all prefixes.

    Raises ValueError or TypeError that names the attribute.
    """

    n_features: int
    k: int
    steps: int
    batch_size: int = 4096
    lr: float = 1e-3
    warm_up: float = 0.05
    k_aux: int = 0
    dead_after: int = 10_000_000
    kind: str = "trained"
    precision: str = "float32"
    seed: int = 0
    activation: str = "topk"
    prefixes: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        least = {"n_features": 1, "k": 1, "steps": 1, "batch_size": 1, "k_aux": 0, "dead_after": 1, "seed": 0}
        for name, at_least in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < at_least:
                raise ValueError(f"{name}: expected at least {at_least}, got {value}")
        if self.k > self.n_features:
            raise ValueError(f"k: expected 1 to n_features={self.n_features}, got {self.k}")
        if isinstance(self.lr, bool) or not isinstance(self.lr, Real) or not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a number > 0, got {self.lr!r}")
        if isinstance(self.warm_up, bool) or not isinstance(self.warm_up, Real) or not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up: expected a share from 0 to below 1, got {self.warm_up!r}")
        for name, known in (("kind", KINDS), ("precision", PRECISIONS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        prefix_widths(self.prefixes, self.n_features)

    @property
    def widths(self) -> list[int]:
        """The number of features of each prefix."""
        return prefix_widths(self.prefixes, self.n_features)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, which counts from 0."""
        warm = round(self.warm_up * self.steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file. Of ``activation`` and ``prefixes``, what differs from the default."""
        usual = {"activation": "topk", "prefixes": (1.0,)}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}


def prefix_widths(prefixes: Sequence[float], n_features: int) -> list[int]:
    """The number of features of each prefix. Raises ValueError if ``prefixes`` are not increasing shares up to 1."""
    shares = all(not isinstance(share, bool) and isinstance(share, Real) and 0 < share <= 1 for share in prefixes)
    widths = [round(share * n_features) for share in prefixes] if shares else []
    if not widths or prefixes[-1] != 1 or any(b <= a for a, b in zip([0, *widths], widths, strict=False)):
        raise ValueError(
            f"prefixes: expected increasing shares of the {n_features} features that end with 1 and have at least one "
            f"feature more than the last, got {list(prefixes)}"
        )
    return widths
