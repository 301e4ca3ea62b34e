"""Runs ``parity.py``: here on a GPU; without one in a process of its own, under Triton's interpreter.

The interpreter must be chosen before triton is first imported, and by now torch may have done that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.register_assert_rewrite("tests.kernels.parity")

ROOT = Path(__file__).parents[2]

if torch.cuda.is_available():
    from tests.kernels.parity import *  # noqa: F403
else:

    @pytest.mark.slow
    def test_parity_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command.append("tests/kernels/parity.py")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
