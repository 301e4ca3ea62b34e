"""The paths for CUDA, rehearsed without a GPU (see tests/rehearsal/card.py): in processes that believe in one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARES = (("attribution",), ("evaluation", "training", "rules"))  # a process each, of about the same length
COMPILER = os.environ.get("CXX", "c++")


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda or torch.version.hip, reason="this torch was built for GPUs: see test_gpu.py")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER}")
def test_on_the_card(request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    folder = request.config.cache.mkdir("card")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTFG_CARD": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    files = [[f"tests/rehearsal/{name}.py" for name in share] for share in SHARES]
    runs = [
        subprocess.Popen([*command, "-p", "tests.rehearsal.plugin", *share], cwd=ROOT, env=environment, **pipes)
        for share in files
    ]
    outputs = [run.communicate()[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output[-6000:]
