"""The first use of the ops may come from several threads at once."""

import subprocess
import sys

import pytest

CODE = """
import sys, threading
sys.setswitchinterval(1e-6)
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fastfg import ops

there = sys.argv[1]
together, wrong = threading.Barrier(12), []
with FakeTensorMode():  # torch's own first use is not what is tested
    torch.empty(2, device=there).add(1)

def use():
    try:
        together.wait()
        with FakeTensorMode():
            scores = torch.empty(2, 5, device=there)
            assert ops.gate(scores, 0.7, 5.0).shape == (2, 5)
            rows, q = torch.empty(1, 2, 5, device=there), torch.empty(2, 1, 5, 4, device=there)
            assert ops.relevancy(rows, q, q, q, q, 0.5).shape == (1, 2, 5)
    except BaseException as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=use) for _ in range(together.parties)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong)
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_threads_may_share_the_first_use(device):
    """Uses fake tensors, so no GPU is needed."""
    run = subprocess.run([sys.executable, "-c", CODE, device], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
