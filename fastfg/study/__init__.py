"""Compare variants on the same images, compute the statistics, and run the demo on real photographs."""

from fastfg.study.comparison import Comparison, compare, compare_batch
from fastfg.study.paired import paired
from fastfg.study.rank import rank_test
from fastfg.study.statistics import summarize
from fastfg.study.token_cache import TokenCache
from fastfg.study.token_writer import cache_tokens
from fastfg.study.train_saes import train_saes

__all__ = [
    "Comparison",
    "TokenCache",
    "cache_tokens",
    "compare",
    "compare_batch",
    "paired",
    "rank_test",
    "summarize",
    "train_saes",
]
