"""The public ops, one file per op: its argument checks, its torch schema, and the conversion of its arguments.

:mod:`fastfg.ops.dispatch` chooses the backend: plain torch (:mod:`fastfg.reference`), C++ (:mod:`fastfg.ops.native`) or
Triton (:mod:`fastfg.ops.launch`). No op is differentiable: inputs may require grad, but results never do.
``adam_topk`` changes the weights that it is given; no other op changes its arguments.
"""

from fastfg.ops.adam_topk import adam_topk
from fastfg.ops.decode_topk import decode_topk
from fastfg.ops.encode_project import encode_project
from fastfg.ops.encode_topk import encode_topk
from fastfg.ops.gate import gate
from fastfg.ops.gated_relevancy import gated_relevancy
from fastfg.ops.project import project
from fastfg.ops.relevancy import relevancy

__all__ = [
    "adam_topk",
    "decode_topk",
    "encode_project",
    "encode_topk",
    "gate",
    "gated_relevancy",
    "project",
    "relevancy",
]
