"""The paper's protocol: variants side by side, their statistics, and the demo on real photographs."""

from fastfg.study.comparison import Comparison, compare, compare_batch
from fastfg.study.statistics import summarize

__all__ = ["Comparison", "compare", "compare_batch", "summarize"]
