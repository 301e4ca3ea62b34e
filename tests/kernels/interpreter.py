"""Triton's interpreter with two fixes.

Import this before the first kernel is launched, in a process that has ``TRITON_INTERPRET=1`` in its environment.
"""

from __future__ import annotations

import importlib

import triton.language as tl
from triton.runtime import interpreter

from fastfg import ops
from fastfg.ops import dispatch, launch

_patch_tensor, _create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot


def _patched(tensor, scope):
    """NumPy 2.4 does not convert an array with one entry to an int, which Triton 3.6 needs for each loop bound."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widened(x):
    """Triton 3.6 stores a bfloat16 number as its bits, and would multiply the bits."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)


def _dot(self, a, b, *rest):
    return _create_dot(self, _widened(a), _widened(b), *rest)


interpreter._patch_lang_tensor = _patched
interpreter.InterpreterBuilder.create_dot = _dot


def serve_cpu_tensors():
    """Make ``backend="triton"`` accept CPU tensors."""

    def interpreted(op):
        return lambda *arguments: getattr(importlib.import_module(f"fastfg.kernels.{op}"), op)(*arguments)

    for op in ops.__all__:
        launch.LIBRARY.impl(op, interpreted(op), "CPU")
    dispatch._misplaced = lambda *_: None
