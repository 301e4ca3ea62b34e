"""Faithfulness metrics, one file per metric. The score functions can also be used on their own."""

from fastfg.metrics.aopc import AOPC
from fastfg.metrics.choose import DEFAULT_METRICS, METRICS
from fastfg.metrics.deletion import Deletion
from fastfg.metrics.describe import table
from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation, correlation
from fastfg.metrics.infidelity import Infidelity
from fastfg.metrics.insertion import Insertion
from fastfg.metrics.metric import Metric, Plan
from fastfg.metrics.monotonicity import Monotonicity
from fastfg.metrics.pixel_flipping import PixelFlipping, area
from fastfg.metrics.saco import SaCo, saco_score
from fastfg.metrics.sensitivity_n import SensitivityN
from fastfg.metrics.srg import SRG
from fastfg.metrics.top_patches import Comprehensiveness, Sufficiency

__all__ = [
    "AOPC",
    "DEFAULT_METRICS",
    "METRICS",
    "SRG",
    "Comprehensiveness",
    "Deletion",
    "FaithfulnessCorrelation",
    "Infidelity",
    "Insertion",
    "Metric",
    "Monotonicity",
    "PixelFlipping",
    "Plan",
    "SaCo",
    "SensitivityN",
    "Sufficiency",
    "area",
    "correlation",
    "saco_score",
    "table",
]
