"""Faithfulness metrics, one file each: what is perturbed, and the arithmetic, which also stands alone."""

from fastfg.metrics.faithfulness_correlation import FaithfulnessCorrelation, correlation
from fastfg.metrics.metric import Metric
from fastfg.metrics.pixel_flipping import PixelFlipping, area
from fastfg.metrics.saco import SaCo, saco_score
from fastfg.metrics.subjects import Subjects

METRICS: dict[str, type[Metric]] = {
    "saco": SaCo,
    "faithfulness_correlation": FaithfulnessCorrelation,
    "pixel_flipping": PixelFlipping,
}

__all__ = [
    "METRICS",
    "FaithfulnessCorrelation",
    "Metric",
    "PixelFlipping",
    "SaCo",
    "Subjects",
    "area",
    "correlation",
    "saco_score",
]
