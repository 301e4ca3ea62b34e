"""The paper's protocol: variants side by side, their statistics, and the demo on real photographs."""

from fastfg.study.compare import Comparison, compare
from fastfg.study.statistics import summarize

__all__ = ["Comparison", "compare", "summarize"]
