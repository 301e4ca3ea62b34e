"""How fast each op and the whole of ``fastfg.attribute`` are, beside other ways of doing the same.

    pytest bench/                    every suite; small on a CPU, full on a CUDA device
    pytest bench/bench_project.py    one suite, named as its op
        --size small|full            other than by device
        --save                       append a line a benchmark to bench/results/<device>/<suite>.jsonl
        --results DIR                ... to DIR/<device>/<suite>.jsonl
    python -m bench.report           tables from these lines

A provider is timed only after its result has been compared with the reference in float64.
"""

import torch

torch.backends.cudnn.allow_tf32 = False  # float32 is float32 here: a convolution in TF32 keeps three digits of it
