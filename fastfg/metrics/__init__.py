"""Metrics of attribution maps, one file per metric. The score functions can also be used on their own."""

from fastfg.metrics.aopc import AOPC
from fastfg.metrics.choose import DEFAULT_METRICS, METRICS
from fastfg.metrics.deletion import Deletion
from fastfg.metrics.describe import table
from fastfg.metrics.efficient_parameter_randomization import EfficientParameterRandomization, histogram_entropy
from fastfg.metrics.explanation_metric import Change, ExplanationMetric, Subject, similarity
from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation, correlation
from fastfg.metrics.infidelity import Infidelity
from fastfg.metrics.insertion import Insertion
from fastfg.metrics.iou import IoU
from fastfg.metrics.localisation import Localisation
from fastfg.metrics.max_sensitivity import MaxSensitivity, relative_change
from fastfg.metrics.metric import Metric, Plan
from fastfg.metrics.monotonicity import Monotonicity
from fastfg.metrics.parameter_randomization import ParameterRandomization
from fastfg.metrics.pixel_flipping import PixelFlipping, area
from fastfg.metrics.pointing_game import PointingGame
from fastfg.metrics.random_logit import RandomLogit
from fastfg.metrics.relevance_mass import RelevanceMass, mass_accuracy
from fastfg.metrics.relevance_rank import RelevanceRank
from fastfg.metrics.road import ROAD
from fastfg.metrics.roc_auc import RocAuc, area_under_roc
from fastfg.metrics.saco import SaCo, saco_score
from fastfg.metrics.sensitivity_n import SensitivityN
from fastfg.metrics.srg import SRG
from fastfg.metrics.top_k_intersection import TopKIntersection
from fastfg.metrics.top_patches import Comprehensiveness, Sufficiency

__all__ = [
    "AOPC",
    "DEFAULT_METRICS",
    "METRICS",
    "ROAD",
    "SRG",
    "Change",
    "Comprehensiveness",
    "Deletion",
    "EfficientParameterRandomization",
    "ExplanationMetric",
    "FaithfulnessCorrelation",
    "Infidelity",
    "Insertion",
    "IoU",
    "Localisation",
    "MaxSensitivity",
    "Metric",
    "Monotonicity",
    "ParameterRandomization",
    "PixelFlipping",
    "Plan",
    "PointingGame",
    "RandomLogit",
    "RelevanceMass",
    "RelevanceRank",
    "RocAuc",
    "SaCo",
    "SensitivityN",
    "Subject",
    "Sufficiency",
    "TopKIntersection",
    "area",
    "area_under_roc",
    "correlation",
    "histogram_entropy",
    "mass_accuracy",
    "relative_change",
    "saco_score",
    "similarity",
    "table",
]
