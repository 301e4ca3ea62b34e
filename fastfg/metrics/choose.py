"""Make the metrics of one evaluation from names, instances and options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastfg.metrics.aopc import AOPC
from fastfg.metrics.deletion import Deletion
from fastfg.metrics.efficient_parameter_randomization import EfficientParameterRandomization
from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation
from fastfg.metrics.infidelity import Infidelity
from fastfg.metrics.insertion import Insertion
from fastfg.metrics.iou import IoU
from fastfg.metrics.localisation import Localisation
from fastfg.metrics.max_sensitivity import MaxSensitivity
from fastfg.metrics.metric import Metric
from fastfg.metrics.monotonicity import Monotonicity
from fastfg.metrics.parameter_randomization import ParameterRandomization
from fastfg.metrics.pixel_flipping import PixelFlipping
from fastfg.metrics.pointing_game import PointingGame
from fastfg.metrics.random_logit import RandomLogit
from fastfg.metrics.relevance_mass import RelevanceMass
from fastfg.metrics.relevance_rank import RelevanceRank
from fastfg.metrics.road import ROAD
from fastfg.metrics.roc_auc import RocAuc
from fastfg.metrics.saco import SaCo
from fastfg.metrics.sensitivity_n import SensitivityN
from fastfg.metrics.srg import SRG
from fastfg.metrics.top_k_intersection import TopKIntersection
from fastfg.metrics.top_patches import Comprehensiveness, Sufficiency
from fastfg.perturb import Baseline
from fastfg.perturb.fills import check_baseline_type

# The other columns of a table of scores
RESERVED = ("index", "image", "group", "key", "path", "variant", "target", "error")
ALL: tuple[type[Metric], ...] = (
    SaCo,
    FaithfulnessCorrelation,
    PixelFlipping,
    Deletion,
    Insertion,
    SRG,
    AOPC,
    Comprehensiveness,
    Sufficiency,
    Monotonicity,
    Infidelity,
    SensitivityN,
    ROAD,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    TopKIntersection,
    RocAuc,
    IoU,
    MaxSensitivity,
    ParameterRandomization,
    EfficientParameterRandomization,
    RandomLogit,
)
METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in ALL}
WITHOUT_MASKS = tuple(name for name, metric in METRICS.items() if not issubclass(metric, Localisation))
DEFAULT_METRICS = ("saco", "faithfulness_correlation", "pixel_flipping")


def choose_metrics(
    metrics: Sequence[str | Metric], options: Mapping[str, Mapping[str, Any] | None], baseline: Baseline
) -> list[Metric]:
    """One instance per entry of ``metrics``.

    Args:
        metrics: names in :data:`METRICS`, or instances. All names must differ.
        options: {name: arguments of that metric}, for metrics that are given by name.
        baseline: for metrics that have none of their own.
    """
    check_baseline_type(baseline)
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise TypeError(f"metrics: expected a sequence of names or instances of Metric, got {metrics!r}")
    if unknown := [name for name in options if name not in METRICS]:
        raise TypeError(f"{unknown[0]}: expected the name of a metric, one of {tuple(METRICS)}, as an option")
    chosen: dict[str, Metric] = {}
    for given in metrics:
        metric = given if isinstance(given, Metric) else _by_name(given, options)
        if isinstance(given, Metric) and options.get(getattr(metric, "name", "")):
            raise ValueError(f"{metric.name}: expected no options for a metric that is given as an instance, got some")
        name = getattr(metric, "name", None)
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(
                f"metrics: expected {type(metric).__name__}.name, a text not among {RESERVED}, got {name!r}"
            )
        if metric.name in chosen:
            raise ValueError(f"metrics: expected each name once, got {metric.name!r} twice")
        chosen[metric.name] = metric if metric.baseline is not None else metric.changed(baseline=baseline)
    if not chosen:
        raise ValueError("metrics: expected at least one, got none")
    if unused := [name for name, given in options.items() if given and name not in chosen]:
        raise ValueError(f"{unused[0]}: expected no options, as it is not among the metrics {tuple(chosen)}")
    return list(chosen.values())


def taking(metrics: Sequence[str], **option: Any) -> dict[str, Any]:
    """{metric: option} for those of ``metrics`` that have this one option, such as ``patches_per_step=4``."""
    (name,) = option
    return {metric: dict(option) for metric in metrics if hasattr(METRICS[metric], name)}


def _by_name(name: Any, options: Mapping[str, Mapping[str, Any] | None]) -> Metric:
    if not isinstance(name, str) or name not in METRICS:
        raise ValueError(f"metrics: expected names among {tuple(METRICS)} or instances of Metric, got {name!r}")
    try:
        return METRICS[name](**(options.get(name) or {}))
    except TypeError as error:
        raise TypeError(f"{name}: unexpected option ({error})") from None
