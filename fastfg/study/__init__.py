"""Compare variants on the same images, compute the statistics, and run the demo on real photographs."""

from fastfg.study.comparison import Comparison, compare, compare_batch
from fastfg.study.statistics import summarize

__all__ = ["Comparison", "compare", "compare_batch", "summarize"]
