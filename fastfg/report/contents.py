"""What a report is made of: :class:`Contents` and its parts. Whoever has the results fills them in.

Every part is optional, except a claim and the scores. A part that is missing leaves no empty section behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]

OPPOSITE = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"}
ROLES = ("baseline", "method", "control", "seed", "other")
COLUMNS: dict[str, tuple[str, ...]] = {
    "scores": ("variant",),
    "summary": ("variant", "metric", "mean", "se", "n", "missing", "p", "stars"),
    "paired": ("variant", "metric", "n", "difference", "low", "high", "p_holm", "mde", "verdict", "reason"),
    "layers": ("block", "score", "metric", "mean", "se", "n"),
    "combinations": ("layers", "metric", "mean", "se", "n"),
    "sweep": ("kappa", "c_max", "metric", "mean", "se", "n"),
    "curves": ("variant", "mode", "order", "fraction", "mean", "low", "high"),
    "shuffled": ("metric", "variant", "seed", "mean"),
    "ranks": ("metric", "mean", "best_shuffled", "rank", "n_shuffled", "p"),
    "ablations": (
        *("image", "block", "feature", "patch", "gate"),
        *("predicted_gate", "actual_gate", "predicted_logit", "actual_logit"),
    ),
}


@dataclass(frozen=True)
class Effect:
    """One paired difference: ``variant`` minus ``against`` in ``metric``, with its 95% interval [low, high].

    ``p`` is corrected for the family of comparisons (Holm); ``n`` counts the images, which are in ``groups`` groups
    (None: not known; without groups, the number of different images), and ``missing`` those without both scores. NaN
    where a test is not defined; ``reason`` says why, or why the verdict is open.
    """

    variant: str
    against: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    verdict: str = ""
    groups: int | None = None
    reason: str | None = None
    missing: int = 0

    @classmethod
    def of(cls, paired: pd.DataFrame, variant: str, metric: str, against: str) -> Effect:
        """The row of ``paired``, a table of :func:`fastfg.study.paired` against the variant ``against``."""
        found = paired.loc[(paired["variant"] == variant) & (paired["metric"] == metric)]
        if len(found) != 1:
            raise ValueError(f"paired: expected one row for {variant!r} and {metric!r}, got {len(found)}")
        row = found.iloc[0]
        difference, low, high, p = (float(row[name]) for name in ("difference", "low", "high", "p_holm"))
        groups = int(row["groups"]) if "groups" in found else None
        n, verdict, reason = int(row["n"]), str(row["verdict"]), row.get("reason") or None
        missing = int(row.get("missing", 0))
        return cls(variant, against, metric, difference, low, high, p, n, verdict, groups, reason, missing)

    def reversed(self) -> Effect:
        """``against`` minus ``variant``.

        >>> other = Effect("gate", "random", "srg", 0.2, 0.1, 0.4, 0.01, 12, "better").reversed()
        >>> other.variant, other.difference, other.low, other.high, other.verdict
        ('random', -0.2, -0.4, -0.1, 'worse')
        """
        return replace(
            self,
            variant=self.against,
            against=self.variant,
            difference=0 - self.difference,  # not -0.0
            low=0 - self.high,
            high=0 - self.low,
            verdict=OPPOSITE.get(self.verdict, self.verdict),
        )


@dataclass(frozen=True)
class Condition:
    """One thing that a claim rests on: what is required, whether it holds (None: it could not be tested), and why."""

    text: str
    holds: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence with the answer, whether the claim holds (None: nothing is claimed), and what that rests on.

    ``sentence`` already says what was found, so that it reads right alone: "The gate does not improve SRG: ...".
    """

    sentence: str
    holds: bool | None
    conditions: Sequence[Condition] = ()
    effects: Sequence[Effect] = ()


@dataclass(frozen=True)
class Variant:
    """What a variant is. ``role`` is one of ``ROLES``; ``seed`` is one of several that differ by a seed alone."""

    name: str
    role: str = "other"
    about: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: expected one of {ROLES}, got {self.role!r}")


@dataclass(frozen=True)
class PatchEvidence:
    """Where the scores of an image's patches come from, at one block. ``P`` patches in reading order, ``n`` features.

    ``contributions.sum(1) + remaining == scores``, and ``scores + bias + sae_error == g_dot_x``.

    Attributes:
        features: [P, n] int, the features that contribute most by absolute value; -1 where there are fewer.
        contributions: [P, n], ``f_k (W_dec[k] . g)``; 0 where ``features`` is -1.
        remaining: [P], the sum over all other features. active: [P] int, how many features are active.
        scores, z, gates: [P], eq. 3 to 5.
        sae_error: [P], ``g . (x - x_hat)``. g_dot_x: [P], ``g . x``, the score without an SAE.
        bias: [P], ``g . b_dec``; for an SAE that normalises its input, also what the token's own scale changes.
    """

    features: Array
    contributions: Array
    remaining: Array
    active: Array
    scores: Array
    z: Array
    gates: Array
    sae_error: Array
    bias: Array
    g_dot_x: Array

    def __post_init__(self) -> None:
        P = len(self.scores)
        if self.features.ndim != 2 or self.features.shape != self.contributions.shape or len(self.features) != P:
            raise ValueError(
                f"contributions: expected [{P}, n] as features, got {self.contributions.shape} for features "
                f"{self.features.shape}"
            )
        for name in ("remaining", "active", "z", "gates", "sae_error", "bias", "g_dot_x"):
            if getattr(self, name).shape != (P,):
                raise ValueError(f"{name}: expected [{P}], one per patch, got {list(getattr(self, name).shape)}")


@dataclass(frozen=True)
class Crop:
    """A patch that activates a feature, with its surroundings: ``picture`` [h, w, 3] uint8 of the image ``key``.

    ``box`` is the patch in the crop: left, top, width, height in pixels. ``name``: of the image's file, if it is known.
    """

    picture: Array
    key: str
    activation: float
    box: tuple[int, int, int, int]
    label: str = ""
    name: str = ""


@dataclass(frozen=True)
class FeatureEvidence:
    """What one feature of a block's SAE responds to, over the patches of many images.

    Attributes:
        density: share of the patches where it is active. n_patches, n_images: how many it was counted on.
        counts, edges: histogram of its activations where it is active, [bins] and [bins + 1].
        lift: {class: share of its activation mass in images of the class / the class's share of the patches}.
        crops: the patches that activate it most, strongest first, at most one per image.
    """

    density: float
    n_patches: int
    n_images: int
    counts: Array
    edges: Array
    lift: Mapping[str, float] = field(default_factory=dict)
    crops: Sequence[Crop] = ()


@dataclass(frozen=True)
class ImageEntry:
    """One image of the gallery.

    Attributes:
        key: as in the column ``image`` (or ``key``) of the scores.
        picture: [H, W, 3] uint8, as the model sees it. maps: {variant: [gh, gw]}, raw.
        label: the true class. predicted, probability: the model's class and its probability. explained: the class that
            the maps explain. group: such as the patient. None where it is not known.
        path: the file. evidence: {block: PatchEvidence} of the variant ``evidence_of`` of :class:`Contents`.
    """

    key: str
    picture: Array
    maps: Mapping[str, Array]
    label: str | None = None
    predicted: str | None = None
    probability: float | None = None
    explained: str | None = None
    group: str | None = None
    path: str | None = None
    evidence: Mapping[int, PatchEvidence] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the report calls the image: the name of its file, or its key where no file is known."""
        return file_of(self.path) or self.key

    def __post_init__(self) -> None:
        if self.picture.ndim != 3 or self.picture.shape[2] != 3 or self.picture.dtype != np.uint8:
            raise ValueError(
                f"picture: expected uint8 [H, W, 3] for image {self.key!r}, got {self.picture.dtype} "
                f"{list(self.picture.shape)}"
            )
        shapes = {one.shape for one in self.maps.values()}
        if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"maps: expected the same [gh, gw] for all variants of image {self.key!r}, got {shapes}")
        for block, one in self.evidence.items():
            if shapes and len(one.scores) != np.prod(next(iter(shapes))):
                raise ValueError(
                    f"evidence: expected as many patches as in the maps of image {self.key!r}, got {len(one.scores)} "
                    f"at block {block}"
                )


@dataclass(frozen=True)
class Contents:
    """Everything that the report shows. Tables are pandas tables; ``COLUMNS`` names the columns that each must have.

    Attributes:
        title, subtitle: the heading, and the line under it.
        claims: the answers, the most important first; at least one.
        scores: one row per image and variant, as :func:`fastfg.compare` returns it, or with the columns ``key`` and
            ``path`` as ``fastfg evaluate`` writes it.
        metrics: the columns of ``scores`` to show, in this order; the first one is the primary one. None: the metrics
            of ``summary``, else the columns that fastfg has metrics of.
        titles: {metric: what it is called} for names that fastfg does not have. higher_is_better: {metric: direction}.
        variants: what the variants are, in the order of the tables. Without it, the order of ``scores``.
        summary: of :func:`fastfg.study.summarize`. paired: {variant compared with: a table of
            :func:`fastfg.study.paired`}; the first one decides what is bold.
        layers: mean score per ``block`` and ``score`` kind. combinations: per set of ``layers`` (a text). sweep: per
            ``kappa`` and ``c_max``. In each, a column ``chosen`` (bool) may mark what was selected, and ``reference``
            may hold the baseline's mean on the same images, which is drawn as a line.
        curves: readings (``mean`` with a band ``low`` to ``high``) against the ``fraction`` of patches removed, per
            ``variant``, ``mode`` and ``order`` (MIF: most important first, LIF: least important first).
        shuffled: mean score per ``variant`` and ``seed`` (missing for the real decoder), with a column ``mode`` where
            there are several. ranks: of :func:`fastfg.study.rank_test`.
        images: the gallery. difference: the two variants whose maps are subtracted, second minus first.
        features: {(block, feature): FeatureEvidence}, of those in the evidence. evidence_of: the variant it explains.
        ablations: changes when a feature is taken out of an image: of the ``gate`` at the ``patch`` that it changes
            most, and of the target's logit. ``predicted_*`` are from the contributions, ``actual_*`` from a run.
        settings, versions: {name: value}, shown as text. command: the command line. notes: paragraphs.
        errors: images or scores that could not be computed.
    """

    title: str
    claims: Sequence[Claim]
    scores: pd.DataFrame
    subtitle: str = ""
    metrics: Sequence[str] | None = None
    titles: Mapping[str, str] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    variants: Sequence[Variant] = ()
    summary: pd.DataFrame | None = None
    paired: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    layers: pd.DataFrame | None = None
    combinations: pd.DataFrame | None = None
    sweep: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    shuffled: pd.DataFrame | None = None
    ranks: pd.DataFrame | None = None
    images: Sequence[ImageEntry] = ()
    difference: tuple[str, str] | None = None
    features: Mapping[tuple[int, int], FeatureEvidence] = field(default_factory=dict)
    evidence_of: str = ""
    ablations: pd.DataFrame | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    notes: Sequence[str] = ()
    errors: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        if not self.claims:
            raise ValueError("claims: expected at least one Claim, got none")
        tables = {name: getattr(self, name) for name in COLUMNS if name != "paired"}
        for name, table in (tables | {f"paired[{name!r}]": one for name, one in self.paired.items()}).items():
            _check_columns(name, table, COLUMNS[name.split("[")[0]])
        if not {"image", "key"} & set(self.scores.columns):
            raise ValueError(f"scores: expected a column image or key, got {list(self.scores.columns)}")
        _check_once("images", [one.key for one in self.images])
        _check_once("variants", [one.name for one in self.variants])
        names = set(self.scores["variant"])
        unknown = [one.name for one in self.variants if one.name not in names]
        if unknown:
            raise ValueError(f"variants: expected variants of the scores, {sorted(names)}, got {unknown}")

    @property
    def key(self) -> Literal["key", "image"]:
        """The column of ``scores`` that names images."""
        return "key" if "key" in self.scores.columns else "image"


def file_of(path: str | None) -> str:
    """The name of the file at ``path``; empty without a path.

    >>> file_of("photos/cell 1.png"), file_of(None)
    ('cell 1.png', '')
    """
    return PurePath(path).name if path else ""


def _check_columns(name: str, table: pd.DataFrame | None, needed: Iterable[str]) -> None:
    if table is None:
        return
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise ValueError(f"{name}: expected the columns {list(needed)}, got a table without {missing}")


def _check_once(name: str, given: Sequence[str]) -> None:
    again = sorted({one for one in given if given.count(one) > 1})
    if again:
        raise ValueError(f"{name}: expected each name once, got {again[:3]} several times")
