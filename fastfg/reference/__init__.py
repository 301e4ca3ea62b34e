"""The method in plain torch, one line per equation. Every faster backend is compared with these functions.

Letters in shapes, used throughout fastfg: ``B`` images, ``P`` patches, ``N`` tokens (``P`` + prefix tokens), ``H``
heads, ``dh`` head width, ``d`` model width, ``L`` blocks, ``F`` SAE features, ``K`` active features per token, ``C``
gate configurations, ``T`` tokens in a flat batch.

Every function runs on any device, and in float64 for float64 inputs.
"""

from fastfg.reference.adam_topk import adam_topk, topk_gradients
from fastfg.reference.decode_topk import decode_topk
from fastfg.reference.encode import Activation, Normalized, encode, normalize, preactivations
from fastfg.reference.encode_project import encode_project
from fastfg.reference.encode_topk import encode_groupmax, encode_topk
from fastfg.reference.gate import gate
from fastfg.reference.gated_relevancy import gated_relevancy
from fastfg.reference.project import project, project_dense
from fastfg.reference.relevancy import attend, attention_map, pooling_row, relevancy, relevancy_matrix, rollout

__all__ = [
    "Activation",
    "Normalized",
    "adam_topk",
    "attend",
    "attention_map",
    "decode_topk",
    "encode",
    "encode_groupmax",
    "encode_project",
    "encode_topk",
    "gate",
    "gated_relevancy",
    "normalize",
    "pooling_row",
    "preactivations",
    "project",
    "project_dense",
    "relevancy",
    "relevancy_matrix",
    "rollout",
    "topk_gradients",
]
