"""The CUDA code paths, run without a GPU in processes with a fake one (see ``tests/rehearsal/card.py``)."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from tests.subprocesses import Suite

COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(torch.version.cuda or torch.version.hip), reason="torch was built for GPUs: see test_gpu.py"
    ),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER}"),
]


def environment(config):
    card = config.cache.mkdir("card")  # stores the compiled card.cpp
    return {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTFG_CARD": str(card)}


test_on_the_card = Suite(
    shares=[  # of about the same length
        ["tests/rehearsal/attribution.py"],
        ["tests/rehearsal/evaluation.py", "tests/rehearsal/training.py", "tests/rehearsal/rules.py"],
        ["tests/rehearsal/study.py"],
    ],
    environment=environment,
    options=["-p", "tests.rehearsal.plugin"],
)
