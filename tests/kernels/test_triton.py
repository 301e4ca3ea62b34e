"""Runs the parity tests: here on a GPU; without one in a process of its own, under Triton's interpreter.

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
FILES = ("parity", "parity_gated", "parity_drawn")
pytest.register_assert_rewrite(*(f"tests.kernels.{name}" for name in (*FILES, "tools")))

ROOT = Path(__file__).parents[2]

if torch.cuda.is_available():
    from tests.kernels.parity import *  # noqa: F403
    from tests.kernels.parity_drawn import *  # noqa: F403
    from tests.kernels.parity_gated import *  # noqa: F403
else:

    @pytest.mark.slow
    def test_parity_in_the_interpreter():
        """In two processes, for the two cores that any machine has."""
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        paths = [f"tests/kernels/{name}.py" for name in FILES]
        runs = [
            subprocess.Popen([*command, *part], cwd=ROOT, env=environment, **pipes) for part in (paths[:1], paths[1:])
        ]
        outputs = [run.communicate()[0] for run in runs]
        for run, output in zip(runs, outputs, strict=True):
            assert run.returncode == 0, output[-6000:]
