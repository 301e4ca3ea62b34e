"""The types of fastfg's inputs and results: ``Gate``, ``Attribution``, ``Scores``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

METHODS = (
    "random",
    "centre",
    "edges",
    "rollout",
    "last_attention",
    "gradient_x_input",
    "integrated_gradients",
    "grad_cam",
)
Explainer = Callable[[Tensor, Any], Any]  # (images, target) -> maps [B, gh, gw]
Methods = Iterable[str] | Mapping[str, str | Tensor | Explainer]  # names of METHODS, or {name: one of these}
SCORE_KINDS = ("combined", "activation", "gradient", "gradient_signed", "gradient_x_residual", "sae_error")


LARGEST = 1e6  # of kappa and c_max: the product of the gates of several blocks stays within float32


@dataclass(frozen=True)
class Gate:
    """One configuration of the gate: which blocks it gates, how sharply, how strongly, and by which score.

    Args:
        layers: 0-based blocks whose attention maps are gated, one int or several. The scores are computed from the
            residual stream at the output of the same block.
        kappa: sharpness, > 0: ``w = exp(log(c_max) * tanh(kappa * z))``.
        c_max: strength, > 1: gates lie in [1/c_max, c_max].
        score: ``combined`` (the method: each feature times its gradient), ``activation`` (the sum of the codes'
            magnitudes), ``gradient`` (absolute), ``gradient_signed``, ``gradient_x_residual`` (``g . x``, the control
            without an SAE), or ``sae_error`` (``g . (x - x_hat)``, what the SAE leaves out of ``x``).
        shuffle_seed: pairs the codes with a decoder whose rows are permuted with this seed (``combined`` only).
        rescale: multiplies the scores of a normalised SAE by each token's own scale. ``x_hat`` has it already.
        permute_seed: a control for every score: the finished gates are handed to other patches, ``w[perm]`` with
            ``perm = torch.randperm(P)`` drawn on the CPU with this seed. Every image, block and device has the same
            permutation.
        blurred: a control: the map is the vanilla map under a Gaussian blur that changes it as much as this gate does
            (:func:`fastfg.attribution.blurred.blurred`).

    Raises ValueError or TypeError that names the argument.

    >>> import fastfg
    >>> fastfg.Gate(layers=(2, 3, 4), kappa=1.0, c_max=50.0).layers
    (2, 3, 4)
    """

    layers: tuple[int, ...]
    kappa: float = 0.5
    c_max: float = 10.0
    score: str = "combined"
    shuffle_seed: int | None = None
    rescale: bool = False
    permute_seed: int | None = None
    blurred: bool = False

    def __post_init__(self) -> None:
        layers = integers("layers", self.layers)
        object.__setattr__(self, "layers", layers)
        if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
            raise ValueError(f"layers: expected distinct 0-based blocks, at least one, got {layers}")
        for name in ("kappa", "c_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0 < self.kappa <= LARGEST:
            raise ValueError(f"kappa: expected a number > 0, at most {LARGEST:g}, got {self.kappa}")
        if not 1 < self.c_max <= LARGEST:
            raise ValueError(f"c_max: expected a number > 1, at most {LARGEST:g}, got {self.c_max}")
        if self.score not in SCORE_KINDS:
            raise ValueError(f"score: expected one of {SCORE_KINDS}, got {self.score!r}")
        for name in ("shuffle_seed", "permute_seed"):
            if getattr(self, name) is not None:
                (seed,) = integers(name, [getattr(self, name)])
                if not -(2**63) <= seed < 2**64:
                    raise ValueError(f"{name}: expected -2**63 to 2**64 - 1, got {seed}")
        if self.shuffle_seed is not None and self.score != "combined":
            raise ValueError(f"shuffle_seed: expected None with score={self.score!r}, got {self.shuffle_seed}")
        for name in ("rescale", "blurred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.rescale and self.score in ("gradient_x_residual", "sae_error"):
            why = "has no SAE" if not self.needs_sae else "is at the residual stream's own scale"
            raise ValueError(f"rescale: expected False with score={self.score!r}, which {why}, got True")

    @property
    def needs_sae(self) -> bool:
        """Whether this gate's score needs an SAE."""
        return self.score != "gradient_x_residual"

    def shuffled(self, seeds: Iterable[int], name: str = "shuffled") -> dict[str, Gate]:
        """This gate with one shuffled decoder per seed: {"shuffled 0": Gate, ...}, for ``compare(gates=...)``.

        >>> import fastfg
        >>> list(fastfg.Gate((2, 3)).shuffled(range(3)))
        ['shuffled 0', 'shuffled 1', 'shuffled 2']
        """
        return {f"{name} {seed}": replace(self, shuffle_seed=seed) for seed in _seeds(seeds)}

    def permuted(self, seeds: Iterable[int], name: str = "permuted") -> dict[str, Gate]:
        """This gate with its values on permuted patches, one permutation per seed: {"permuted 0": Gate, ...}."""
        return {f"{name} {seed}": replace(self, permute_seed=seed) for seed in _seeds(seeds)}


def _seeds(given: Any) -> tuple[int, ...]:
    """``given`` as ints. Raises ValueError for one that is there twice, as one variant would replace the other."""
    seeds = integers("seeds", given)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected each seed once, got {list(seeds)}")
    return seeds


def integers(name: str, value: Any) -> tuple[int, ...]:
    """``value``, one integer or several, as a tuple of ints; bools and floats are refused."""
    several = list(value) if isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0 else [value]
    try:
        if any(isinstance(n, bool) for n in several):
            raise TypeError
        return tuple(operator.index(n) for n in several)
    except TypeError:
        raise TypeError(f"{name}: expected integers, got {value!r}") from None


class Features(NamedTuple):
    """The strongest feature contributions ``f_k (W_dec[k] . g)`` per patch, by absolute value.

    ``indices`` and ``values``: [B, P, n], or [C, B, P, n] for a list of gates. They are padded with index -1 and value
    0 where a patch has fewer than n active features, and where a configuration does not gate the block.
    """

    indices: Tensor
    values: Tensor


@dataclass
class Attribution:
    """The result of ``fastfg.attribute``. For a list of gates, maps, scores and gates have a leading dimension ``C``.

    Attributes:
        maps: [B, gh, gw], the relevancy per patch, not normalised; float32, or float64 for a float64 model and under
            mean pooling, where each patch starts at ``1 / N`` and may differ little from it.
        target: [B] int64, the explained class per image; or the target function that was given.
        logits: [B, n] of the model. For a target function, the model's unchanged output (a tensor is detached).
        scores: {block: [B, P]}, the scores ``s`` of the patches (eq. 3). For a list of gates, the score is NaN where a
            configuration does not gate the block.
        gates: {block: [B, P]}, the multipliers ``w`` (eq. 5), 1 where a configuration does not gate the block.
        features: {block: Features}, empty unless ``features=n`` was given.
        methods: {name: [B, gh, gw]}, the other explanations of ``methods=``; float32, or float64 for a float64 model.
    """

    maps: Tensor
    target: Any  # a tensor, or the target function
    logits: Any
    scores: dict[int, Tensor] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Features] = field(default_factory=dict)
    methods: dict[str, Tensor] = field(default_factory=dict)

    def heatmap(self, size: tuple[int, int]) -> Tensor:
        """The maps [..., H, W], upsampled bilinearly to ``size`` (height, width), each scaled to the range 0 to 1.

        A map that has the same value everywhere becomes 0. The patches are stretched to all of ``size``: pass a size
        that is a multiple of the patch (``gh * patch``), where the model leaves out pixels at the image's edge.
        """
        return heatmap(self.maps, size)


def heatmap(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``maps`` [..., gh, gw] upsampled bilinearly to ``size``, [..., H, W], each scaled to the range 0 to 1."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    large = F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)
    low, high = large.amin((-2, -1), keepdim=True), large.amax((-2, -1), keepdim=True)
    return torch.where(high == low, 0.0, (large - low) / torch.where(high == low, 1.0, high - low))


class ScoreError(NamedTuple):
    """Why an image has no score: the metric, the map of a list (None for a single map), the image, the reason."""

    metric: str
    config: int | None
    image: int
    key: str
    message: str


@dataclass
class Scores(Mapping[str, Tensor]):
    """The result of ``fastfg.evaluate``: ``scores["saco"]`` is float64 [B], or [C, B] for maps [C, B, gh, gw].

    A score that could not be computed is NaN, and ``errors`` says why; it is never 0.

    Attributes:
        by_metric: {metric: scores}, the content of this mapping.
        details: {metric: {name: tensor}}, see each metric.
        errors: one :class:`ScoreError` per missing score.
        image_keys: the images' keys, which random draws depend on.
        forwards: {"asked": the forwards if no metric and no map shared any, "run": the forwards that were run,
            "saved": the difference}, counted in images. The forwards that compare tokens with pixels are not
            included. With ``explain``, "attributions" counts the images that it explained.
        path: how the model was run: ``tokens``, or ``pixels`` with the reason.
    """

    by_metric: dict[str, Tensor]
    details: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    errors: list[ScoreError] = field(default_factory=list)
    image_keys: list[str] = field(default_factory=list)
    forwards: dict[str, int] = field(default_factory=dict)
    path: str = "pixels"

    def __getitem__(self, metric: str) -> Tensor:
        return self.by_metric[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_metric)

    def __len__(self) -> int:
        return len(self.by_metric)

    def summary(self) -> dict[str, Any]:
        """Mean per metric over the images that have a score: {metric: [] or [C]}."""
        return {name: value.nanmean(-1) for name, value in self.by_metric.items()}
