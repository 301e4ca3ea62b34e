"""The Triton kernels, under Triton's interpreter if there is no GPU.

On a GPU, ``tests/ops/test_parity.py`` tests the backend ``triton`` directly, and this file adds the tests of parts that
only these kernels have. The interpreter must be chosen before Triton is first imported, and torch may have imported it
already. So the interpreter runs in separate processes.
"""

from __future__ import annotations

import pytest
import torch

from tests.subprocesses import Suite

pytest.register_assert_rewrite("tests.kernels.internals", "tests.ops.compare")

if torch.cuda.is_available():
    from tests.kernels.internals import *  # noqa: F403
else:
    pytestmark = pytest.mark.slow
    test_in_the_interpreter = Suite(
        shares=[
            ["tests/ops/test_parity.py"],
            ["tests/ops/test_modes.py", "tests/ops/test_adam_topk.py", "tests/kernels/internals.py"],
        ],
        environment=lambda config: {"TRITON_INTERPRET": "1"},
    )
