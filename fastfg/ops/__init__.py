"""The public ops. Each file is one op: its checks, its torch schema, and how its arguments reach a backend.

:mod:`fastfg.ops.dispatch` chooses the backend: plain torch (:mod:`fastfg.reference`), C++ (:mod:`fastfg.ops.native`) or
Triton (:mod:`fastfg.ops.launch`). No op is differentiable: inputs may require grad, and results never do.
"""

from fastfg.ops.encode_project import encode_project
from fastfg.ops.encode_topk import encode_topk
from fastfg.ops.gate import gate
from fastfg.ops.gated_relevancy import gated_relevancy
from fastfg.ops.project import project
from fastfg.ops.relevancy import relevancy

__all__ = ["encode_project", "encode_topk", "gate", "gated_relevancy", "project", "relevancy"]
