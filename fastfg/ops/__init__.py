"""The public ops: each checks its arguments and hands them to the backend that serves them."""

from fastfg.ops.encode_project import encode_project
from fastfg.ops.encode_topk import encode_topk
from fastfg.ops.gate import gate
from fastfg.ops.gated_relevancy import gated_relevancy
from fastfg.ops.project import project
from fastfg.ops.relevancy import relevancy

__all__ = ["encode_project", "encode_topk", "gate", "gated_relevancy", "project", "relevancy"]
