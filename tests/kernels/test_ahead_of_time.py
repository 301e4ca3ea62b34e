"""Every Triton kernel compiles for sm_80, sm_90 and sm_100: no spills, within shared memory, on the matrix unit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "tests.kernels.compile_all", "--markdown", str(table)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    multiplying = ("flow_kernel", "lse_kernel", "bulk_filter_kernel", "encode_project_kernel", "gated_relevancy_kernel")
    for kernel in (*multiplying, "filter_kernel"):  # the last one is no default on sm_90
        lines = [line for line in done.stdout.splitlines() if line.startswith(kernel) and "sm_90" in line]
        assert any("wgmma" in line for line in lines), kernel
        assert kernel == "filter_kernel" or f"`{kernel}` | bf16 | sm_90" in table.read_text(encoding="utf-8")
