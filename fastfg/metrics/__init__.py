"""Faithfulness metrics, one file per metric. The score functions can also be used on their own."""

from fastfg.metrics.choose import DEFAULT_METRICS, METRICS
from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation, correlation
from fastfg.metrics.metric import Metric, Plan
from fastfg.metrics.pixel_flipping import PixelFlipping, area
from fastfg.metrics.saco import SaCo, saco_score

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "FaithfulnessCorrelation",
    "Metric",
    "PixelFlipping",
    "Plan",
    "SaCo",
    "area",
    "correlation",
    "saco_score",
]
