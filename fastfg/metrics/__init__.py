"""Faithfulness metrics, one file per metric. The score functions can also be used on their own."""

from fastfg.metrics.choose import DEFAULT_METRICS, METRICS
from fastfg.metrics.efficient_parameter_randomization import EfficientParameterRandomization, histogram_entropy
from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject, similarity
from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation, correlation
from fastfg.metrics.max_sensitivity import MaxSensitivity, relative_change
from fastfg.metrics.metric import Metric, Plan
from fastfg.metrics.parameter_randomization import ParameterRandomization
from fastfg.metrics.pixel_flipping import PixelFlipping, area
from fastfg.metrics.random_logit import RandomLogit
from fastfg.metrics.saco import SaCo, saco_score

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Change",
    "EfficientParameterRandomization",
    "ExplanationMetric",
    "FaithfulnessCorrelation",
    "MaxSensitivity",
    "Metric",
    "ParameterRandomization",
    "PixelFlipping",
    "Plan",
    "RandomLogit",
    "SaCo",
    "Subject",
    "area",
    "correlation",
    "histogram_entropy",
    "relative_change",
    "saco_score",
    "similarity",
]
