"""Metrics of attribution maps, one file per metric. The score functions can also be used on their own."""

from fastfg.metrics.choose import DEFAULT_METRICS, METRICS
from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation, correlation
from fastfg.metrics.iou import IoU
from fastfg.metrics.localisation import Localisation
from fastfg.metrics.metric import Metric, Plan
from fastfg.metrics.pixel_flipping import PixelFlipping, area
from fastfg.metrics.pointing_game import PointingGame
from fastfg.metrics.relevance_mass import RelevanceMass, mass_accuracy
from fastfg.metrics.relevance_rank import RelevanceRank
from fastfg.metrics.roc_auc import RocAuc, area_under_roc
from fastfg.metrics.saco import SaCo, saco_score
from fastfg.metrics.top_k_intersection import TopKIntersection

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "FaithfulnessCorrelation",
    "IoU",
    "Localisation",
    "Metric",
    "PixelFlipping",
    "Plan",
    "PointingGame",
    "RelevanceMass",
    "RelevanceRank",
    "RocAuc",
    "SaCo",
    "TopKIntersection",
    "area",
    "area_under_roc",
    "correlation",
    "mass_accuracy",
    "saco_score",
]
